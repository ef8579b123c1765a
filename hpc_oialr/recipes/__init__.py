"""The package's recipes: YAML files whose first line says what they are for, the second which data they need."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from hpc_oialr.errors import OIALRError, UnknownNameError

FOLDER = Path(__file__).parent


def recipes() -> dict[str, str]:
    """Name and one-line description of every recipe."""
    return {path.stem: _comments(path)[0] for path in sorted(FOLDER.glob("*.yaml"))}


def data_needed(recipe: str) -> str:
    """How to come by the data of one of :func:`recipes`."""
    return _comments(FOLDER / f"{recipe}.yaml")[1].removeprefix("Data: ")


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe: a name of this package, or a YAML file of the user's; UnknownNameError otherwise."""
    path = Path(recipe)
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        raise UnknownNameError("recipe file", str(recipe), recipes())
    if str(recipe) not in recipes():
        raise UnknownNameError("recipe", str(recipe), recipes())
    return FOLDER / f"{recipe}.yaml"


def find_space(space: str | Path) -> Path:
    """The file of a search space: one of the user's, or that of one of :func:`recipes`; UnknownNameError otherwise."""
    path, shipped = Path(space), {each.stem for each in (FOLDER / "spaces").glob("*.yaml")}
    if path.is_file():
        return path
    if str(space) not in shipped:
        raise UnknownNameError("search space", str(space), shipped)
    return FOLDER / "spaces" / f"{space}.yaml"


def batch_scripts() -> list[Path]:
    """The batch scripts for sbatch, from the repository or from where pip puts a package's data."""
    places = (FOLDER.parents[1] / "slurm", Path(sysconfig.get_path("data")) / "share" / "hpc_oialr" / "slurm")
    found = next((scripts for place in places if (scripts := sorted(place.glob("*.sh")))), [])
    if not found:
        raise OIALRError(
            f"there are no batch scripts in {' or '.join(map(str, places))}. Install hpc_oialr into a virtual "
            "environment, or take them from its source archive; oialr submit needs none."
        )
    return found


def _comments(path: Path) -> tuple[str, str]:
    """The first two lines."""
    with path.open(encoding="utf-8") as file:
        first, second = (file.readline().lstrip("#").strip() for _ in range(2))
    return first, second
