"""Names of a package that are imported on first use.

``import torch`` takes seconds, on a busy login node half a minute: a command that only lists jobs must not wait for it.
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def imports_for_types(file: str | None) -> dict[str, str]:
    """Names that a module imports under ``if TYPE_CHECKING``, each with its home."""
    tree = ast.parse(Path(str(file)).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}


def offer(package: str) -> None:
    """Import on first use what a package's ``__init__.py`` imports under ``if TYPE_CHECKING``; call it there."""
    module = sys.modules[package]
    module.__dict__["_homes"] = imports_for_types(module.__file__)
    module.__class__ = _Package


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        home = self.__dict__["_homes"].get(name)
        if home is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home), name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # The import system sets every submodule on its package; a function of the same name takes precedence.
        if not (isinstance(value, ModuleType) and name in self.__dict__["_homes"]):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *self.__dict__["_homes"]})
