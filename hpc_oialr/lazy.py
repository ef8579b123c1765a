"""Names of a package that are imported when they are first used.

``import torch`` takes seconds, on a busy login node half a minute: what only lists jobs must not wait for it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any


def offer(package: str, homes: Mapping[str, Iterable[str]]) -> None:
    """Let a package offer names of other modules without importing these.

    Parameters
    ----------
    package
        Name of the package; call this in its ``__init__.py``.
    homes
        Names by the module that defines them.
    """
    module = sys.modules[package]
    module.__class__ = _Package
    module.__dict__["_homes"] = {name: home for home, names in homes.items() for name in names}


class _Package(ModuleType):
    """A package that imports the homes of its names on demand."""

    def __getattr__(self, name: str) -> Any:
        home = self.__dict__["_homes"].get(name)
        if home is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # The import system hangs every submodule onto its package; a function of the same name goes before it.
        if not (isinstance(value, ModuleType) and name in self.__dict__["_homes"]):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *self.__dict__["_homes"]})
