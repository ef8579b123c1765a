"""Compressed archives as plain ones for a while, so that they can be read in any order."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hpc_oialr.data.shard_files import INDEX, begin
from hpc_oialr.distributed.environment import launch_info
from hpc_oialr.errors import DataError

OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".tgz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
FOLDER = ".unpacked"


@contextmanager
def plain_tars(paths: Sequence[Path], target: Path, plan: Mapping[str, Any]) -> Iterator[list[Path] | None]:
    """The same paths, with each compressed archive unpacked into a hidden folder of ``target``; None if it is complete.

    Rank 0 unpacks, the others wait for it. The folder is removed once ``target`` is complete; until then the next call
    finds the archives there.
    """
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist. Name a folder of images or an archive.")
    begin(target, plan)
    plain: list[Path] = []
    for path in paths:
        opener = OPENERS.get(path.suffix) if path.is_file() else None
        if path.is_file() and opener is None and path.suffix not in (".tar", ".bin"):
            raise DataError(
                f"{path} is no archive that can be read here. Unpack it; wanted: .tar, {', '.join(OPENERS)}."
            )
        if (target / INDEX).exists():
            yield None
            return
        plain.append(path if opener is None else _unpack(path, opener, target))
    yield plain
    if (target / INDEX).exists():
        shutil.rmtree(target / FOLDER, ignore_errors=True)


def _unpack(path: Path, opener: Callable[[Path], Any], parent: Path) -> Path:
    folder, name = parent / FOLDER, path.name.removesuffix(path.suffix).removesuffix(".tar")
    target = folder / f"{name}.tar"
    if launch_info().rank:
        while not target.exists():
            time.sleep(0.2)
        return target
    if target.exists():
        return target
    folder.mkdir(exist_ok=True)
    draft = folder / f".{name}"
    try:
        with opener(path) as source, draft.open("wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be unpacked: {error}. Get it again.") from error
    draft.replace(target)
    return target
