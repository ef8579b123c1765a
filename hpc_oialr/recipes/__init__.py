"""The package's recipes: YAML files whose first line says what they are for, the second which data they need."""

from __future__ import annotations

from pathlib import Path

from hpc_oialr.errors import UnknownNameError

FOLDER = Path(__file__).parent


def recipes() -> dict[str, str]:
    """Name and one-line description of every recipe."""
    return {path.stem: _comments(path)[0] for path in sorted(FOLDER.glob("*.yaml"))}


def data_needed(recipe: str) -> str:
    """How to come by the data of one of :func:`recipes`."""
    return _comments(FOLDER / f"{recipe}.yaml")[1].removeprefix("Data: ")


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe: a name of this package, or a YAML file of your own.

    Raises
    ------
    UnknownNameError
        Listing the valid names.
    """
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if path.is_file():
            return path
        raise UnknownNameError("recipe file", str(recipe), recipes())
    if str(recipe) not in recipes():
        raise UnknownNameError("recipe", str(recipe), recipes())
    return FOLDER / f"{recipe}.yaml"


def _comments(path: Path) -> tuple[str, str]:
    """The first two lines."""
    with path.open(encoding="utf-8") as file:
        first, second = (file.readline().lstrip("#").strip() for _ in range(2))
    return first, second
