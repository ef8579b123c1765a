"""What makes a run's start quick: transformers imports less, garbage is searched for when the run begins."""

from __future__ import annotations

import gc
from pathlib import Path

from transformers.utils import import_utils

from hpc_oialr.garbage import search_as_usual, search_seldom
from hpc_oialr.models.base import _models_listed_once

FILE = str(Path(import_utils.__file__).parents[1] / "models" / "__init__.py")


def test_transformers_knows_the_same_names_from_one_reading() -> None:
    read = import_utils.create_import_structure_from_path
    before = read(Path(FILE).parent)
    found, misses = [], []
    for _ in range(2):
        import_utils.define_import_structure.cache_clear()
        with _models_listed_once(import_utils):
            found.append(import_utils.define_import_structure(FILE))
        misses.append(read.cache_info().misses)
    assert import_utils.create_import_structure_from_path is read
    assert misses[1] == misses[0]
    assert found[0] == found[1]
    read.cache_clear()
    import_utils.define_import_structure.cache_clear()
    assert import_utils.define_import_structure(FILE) == found[0]
    assert read(Path(FILE).parent) == before


def test_garbage_is_searched_for_again_once_all_is_imported() -> None:
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    made = [[] for _ in range(1000)]
    search_as_usual()
    assert (gc.get_threshold(), gc.get_freeze_count()) == (usual, frozen), "nothing of a user's process is frozen"
    try:
        search_seldom()
        assert gc.get_threshold()[0] > 1_000_000
        search_as_usual()
        assert gc.get_threshold() == usual
        assert gc.get_freeze_count() >= frozen + len(made)
    finally:
        gc.set_threshold(*usual)
