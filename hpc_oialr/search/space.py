"""A search space: which settings of a recipe are searched, and between which values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hpc_oialr.errors import ConfigError, OIALRError, UnknownNameError
from hpc_oialr.recipes import find_space
from hpc_oialr.system_errors import read_text
from hpc_oialr.train.command_line import read_yaml
from hpc_oialr.train.load_config import COMMAND_LINE, LoadedConfig, flat, load_config

KINDS = ("float", "int", "choice")
_KEYS = ("kind", "range", "log", "values")


@dataclass(frozen=True)
class Dimension:
    """The values of one setting: a range of numbers, both ends included, or a choice."""

    kind: str
    range: tuple[float, float] = (0.0, 0.0)
    log: bool = False
    values: tuple[Any, ...] = ()

    @property
    def ends(self) -> Sequence[Any]:
        """All choices, or both ends of the range."""
        return self.values if self.kind == "choice" else self.range

    def holds(self, value: Any) -> bool:
        """Whether a value is one of them."""
        if self.kind == "choice":
            return value in self.values
        kinds = (int,) if self.kind == "int" else (int, float)
        inside = isinstance(value, kinds) and not isinstance(value, bool)
        return inside and self.range[0] <= value <= self.range[1]


@dataclass(frozen=True)
class Space:
    """What a space file says."""

    origin: str  # the file's name
    dimensions: Mapping[str, Dimension]  # by dotted name of the setting
    fixed: Mapping[str, Any]  # settings of every trial

    @property
    def tree(self) -> dict[str, Any]:
        """As plain values."""
        ends = {name: [each.kind, each.log, *each.ends] for name, each in self.dimensions.items()}
        return {"space": ends, "fixed": dict(self.fixed)}

    def own_values(self, loaded: LoadedConfig) -> dict[str, Any] | None:
        """The recipe's own values of what is searched; None if one of them lies outside its range."""
        given = flat(loaded.tree)
        own = {name: given.get(name, given.get(f"{name}.class_path")) for name in self.dimensions}
        return own if all(self.dimensions[name].holds(value) for name, value in own.items()) else None


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as on the command line.

    >>> as_arguments({"optimizer.lr": 1e-05, "oialr": None})
    ['--optimizer.lr', '1e-05', '--oialr', 'null']
    """
    return [word for name, value in settings.items() for word in (f"--{name}", _text(value))]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_space(space: str | Path) -> Space:
    """Read a space file: the package's own by the name of its recipe, or the user's by its path.

    Raises :class:`OIALRError` that names the file and the setting if it is not one.
    """
    path = find_space(space)
    try:
        raw = read_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise OIALRError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, Mapping) or not isinstance(raw.get("space"), Mapping) or not raw["space"]:
        raise OIALRError(f"{path} is no search space: it must hold a mapping 'space' of settings and their ranges.")
    for key in raw:
        if key not in ("space", "fixed"):
            raise UnknownNameError("section", str(key), ("space", "fixed"), origin=path.name)
    fixed = raw.get("fixed") or {}
    if not isinstance(fixed, Mapping):
        raise ConfigError("fixed", fixed, "must be a mapping of settings", origin=path.name)
    dimensions = {str(name): _dimension(str(name), value, path.name) for name, value in raw["space"].items()}
    if both := sorted(set(dimensions) & set(fixed)):
        raise ConfigError(both[0], fixed[both[0]], "is searched, and cannot be fixed too", origin=path.name)
    return Space(path.name, dimensions, dict(fixed))


def _dimension(name: str, raw: Any, origin: str) -> Dimension:
    if not isinstance(raw, Mapping) or raw.get("kind") not in KINDS:
        rule = f"must be a mapping with kind: {', '.join(KINDS[:-1])} or {KINDS[-1]}"
        raise ConfigError(name, raw, rule, origin=origin, fix="E.g. {kind: float, range: [1e-4, 1e-2], log: true}.")
    for key in raw:
        if key not in _KEYS:
            raise UnknownNameError(f"key of {name}", str(key), _KEYS, origin=origin)
    kind, log = raw["kind"], raw.get("log", False)
    if kind == "choice":
        values = raw.get("values")
        if not isinstance(values, list) or len(values) < 2 or any(isinstance(v, (list, dict)) for v in values):
            rule = "must be a list of at least two plain values"
            raise ConfigError(f"{name}.values", values, rule, origin=origin)
        if "range" in raw or log:
            raise ConfigError(name, raw, "is a choice, which has values but neither range nor log", origin=origin)
        return Dimension(kind, values=tuple(values))
    ends, numbers = raw.get("range"), (int,) if kind == "int" else (int, float)
    if (
        not isinstance(ends, list)
        or len(ends) != 2
        or not all(isinstance(end, numbers) and not isinstance(end, bool) and math.isfinite(end) for end in ends)
        or not ends[0] < ends[1]
    ):
        what = "whole numbers" if kind == "int" else "numbers"
        raise ConfigError(f"{name}.range", ends, f"must be two {what}, the smaller one first", origin=origin)
    if not isinstance(log, bool) or (log and ends[0] <= 0):
        rule = "must be true or false; true needs a range above 0"
        raise ConfigError(f"{name}.log", log, rule, origin=origin)
    if "values" in raw:
        raise ConfigError(f"{name}.values", raw["values"], f"belongs to a choice, not to kind {kind}", origin=origin)
    return Dimension(kind, (ends[0], ends[1]), log)


def check_space(recipe: str | Path, space: Space, settings: Sequence[str]) -> LoadedConfig:
    """The recipe with the settings of every trial; ``settings`` are those of the command line.

    Raises :class:`OIALRError` if a value at the end of a range does not fit the recipe, if a setting is searched and
    given too, or if the recipe has no validation data.
    """
    fixed = [*as_arguments(space.fixed), *settings]
    loaded = load_config(recipe, fixed)
    given = flat(loaded.typed)
    for name, dimension in space.dimensions.items():
        if any(key == name or key.startswith(f"{name}.") for key in given):
            rule, fix = f"is searched, by {space.origin}", "Leave it out, or out of the space."
            raise ConfigError(name, given.get(name), rule, origin=COMMAND_LINE, fix=fix)
        for value in dimension.ends:
            try:
                load_config(recipe, [*fixed, *as_arguments({name: value})])
            except ConfigError as error:
                raise error.with_context(origin=space.origin) from None
            except UnknownNameError as error:
                raise UnknownNameError(error.kind, error.name, error.valid, origin=space.origin) from None
    data = loaded.config.data
    for name in ("validation", "validation_fraction"):
        if getattr(data, name, None) == 0 and not getattr(data, "split_steps", None):
            rule = "leaves no validation data, by which trials are compared"
            raise ConfigError(
                f"data.{name}", 0, rule, fix=f"E.g. --data.{name} {5000 if name == 'validation' else 0.1}"
            )
    return loaded
