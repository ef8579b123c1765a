"""Packages that import their names on demand."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest

LAZY = ["hpc_oialr", "hpc_oialr.distributed", "hpc_oialr.record"]


@pytest.mark.parametrize("package", LAZY)
def test_every_name_is_there_and_no_module(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert not isinstance(getattr(module, name), types.ModuleType)
        assert name in dir(module)
    assert set(module.__dict__["_homes"]) == set(module.__all__)


def test_a_function_goes_before_the_submodule_of_its_name(tmp_path, monkeypatch):
    (tmp_path / "workshop").mkdir()
    (tmp_path / "workshop" / "__init__.py").write_text(
        "from typing import TYPE_CHECKING\nfrom hpc_oialr.lazy import offer\n"
        "if TYPE_CHECKING:\n    from workshop.work import work\noffer(__name__)\n"
    )
    (tmp_path / "workshop" / "work.py").write_text("def work():\n    return 'done'\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("workshop.work")
    assert importlib.import_module("workshop").work() == "done"


def test_unknown_name():
    module = importlib.import_module("hpc_oialr.record")
    with pytest.raises(AttributeError, match=r"module 'hpc_oialr.record' has no attribute 'Records'"):
        module.Records  # noqa: B018


def test_the_command_line_starts_without_torch():
    code = (
        "import sys; from hpc_oialr.cli.main import make_parser; make_parser();"
        "print(sorted({'torch', 'numpy', 'h5py'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
