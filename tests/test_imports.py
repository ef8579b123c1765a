"""Imports go one way, from the method to the command line, and never round in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "hpc_oialr"
# Each folder may import those before it, and single modules of the top.
ORDER = (
    *("linalg", "lowrank", "optim", "method", "finetune", "distributed", "engines", "operators"),
    *("data", "models", "record", "spectra", "train", "integrations", "serve", "report"),
    *("launch", "doctor", "plan", "search", "cli"),
)


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


@cache
def imports(file: Path) -> list[str]:
    """Modules of the package that a file imports when it runs, in functions too."""
    return list(_imports(tree_of(file)))


def _imports(tree: ast.Module) -> Iterator[str]:
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hpc_oialr"):
            below = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if module_file(name) else node.module for name in below)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("hpc_oialr"))


def module_file(name: str) -> Path | None:
    path = PACKAGE.parent / Path(*name.split("."))
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.exists()), None)


FILES = {
    ".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): f
    for f in PACKAGE.rglob("*.py")
}


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name: {m for m in imports(file) if m != name} for name, file in FILES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' -> '.join(error.args[1])}") from None


def test_folders_import_one_way() -> None:
    wrong = []
    for name, file in FILES.items():
        folder = name.split(".")[1] if name.count(".") > 1 else ""
        for other in {m.split(".")[1] for m in imports(file) if m.count(".") > 0}:
            if folder in ORDER and other in ORDER and ORDER.index(other) > ORDER.index(folder):
                wrong.append(f"{name} imports {other}")
    assert not wrong
    assert {f.parent.name for f in PACKAGE.glob("*/__init__.py")} - set(ORDER) == {"recipes"}


# Names that a newcomer would not guess, and what is said instead.
DIALECT = {
    "make_shell": "empty_factors",
    "BasisChanges": "BasisUpdater",
    "StabilityWatch": "StabilityTracker",
    "heed": "catch_signals",
    "leave_hard": "configure_nccl_watchdog",
    "Vitals": "NodeInfo",
    "LonelyWorld": "FakeWorld",
    "rehearse": "scripted_run",
    "Patient": "CheckContext",
    "Salvage": "RepairResult",
    "Ports": "ShardSpec",
    "seen_by_any": "any_rank",
}
SENTENCES = (
    "another process's wish",
    "where nobody hears it",
    "has reached it anyway",
    "Who factorises",
    "Who am I, of",
)


def test_names_are_those_of_the_field() -> None:
    found = []
    for file in FILES.values():
        text = file.read_text()
        names = {node.id for node in ast.walk(tree_of(file)) if isinstance(node, ast.Name)}
        found += [f"{file}: {name}, say {better}" for name, better in DIALECT.items() if name in names]
        found += [f"{file}: {sentence!r}" for sentence in SENTENCES if sentence in text]
    assert not found
