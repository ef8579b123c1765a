"""From a recipe and the command line to a checked :class:`RunConfig`: YAML < command line."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from hpc_oialr.errors import ConfigError, OIALRError
from hpc_oialr.recipes import find_recipe
from hpc_oialr.system_errors import read_text
from hpc_oialr.train.command_line import parse_settings, read_yaml, write_yaml
from hpc_oialr.train.config import RunConfig
from hpc_oialr.train.config_tree import (
    Normaliser,
    Tree,
    choices,
    field_types,
    find_choice,
    in_section,
    is_choice,
    merge_trees,
    section_type,
    short_path,
)

COMMAND_LINE = "the command line"
# The largest seed of torch and NumPy.
LARGEST = 2**64 - 1


@dataclass(frozen=True)
class LoadedConfig:
    """A run's settings in their three forms.

    Attributes
    ----------
    config
        The checked object.
    tree
        Every setting, defaults included, as plain values.
    origins
        Where each given setting came from, by dotted name.
    typed
        What the command line gave, as plain values.
    """

    config: RunConfig
    tree: Tree
    origins: Mapping[str, str]
    typed: Tree = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The effective settings as YAML."""
        return write_yaml(self.tree)


def load_config(recipe: str | Path, arguments: Sequence[str] = ()) -> LoadedConfig:
    """Read a recipe by name, or a YAML file, and the settings of the command line on top.

    Raises
    ------
    UnknownNameError
        For an unknown recipe, setting or type; lists the valid ones.
    ConfigError
        For a value of the wrong type or out of its range; names its origin.
    """
    path = find_recipe(recipe)
    try:
        raw = read_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise OIALRError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    typed = parse_settings(arguments)
    return dataclasses.replace(from_trees([(path.name, raw), (COMMAND_LINE, typed)]), typed=typed)


def from_trees(layers: Sequence[tuple[str, Any]]) -> LoadedConfig:
    """Merge trees, each with the name of its origin, later ones on top, and check the result."""
    origins: dict[str, str] = {}
    merged: Tree = {}
    dense: Tree = {}
    for origin, raw in layers:
        normaliser = Normaliser(origin, origins)
        own = {k: v for k, v in raw.items() if k != "dense"} if isinstance(raw, Mapping) else raw
        merged = merge_trees(merged, normaliser.section(own, RunConfig, merged))
        twin = (raw.get("dense") if isinstance(raw, Mapping) else None) or {}
        for name in ("oialr", "dense"):
            if isinstance(twin, Mapping) and twin.get(name) is not None:
                raise ConfigError(
                    f"dense.{name}", twin[name], "has no effect: the dense twin has none", origin=origin
                )
        dense = merge_trees(dense, normaliser.section(twin, RunConfig, merge_trees(merged, dense), "dense"))
    config = _build(RunConfig, merged, origins)
    config.dense = dense or None
    return LoadedConfig(config, {**_as_tree(config, RunConfig), "dense": dense or None}, origins)


def dense_twin(loaded: LoadedConfig, *, own: bool) -> LoadedConfig:
    """The same run without the method; with the recipe's ``dense`` settings if ``own``.

    What was typed on the command line goes over them: ``--train.epochs 4`` is 4 epochs on both sides, and
    ``--dense.train.epochs 4`` on this one.
    """
    layers: list[tuple[str, Tree]] = [("config.yaml", {**loaded.tree, "dense": None})]
    if own and loaded.config.dense:
        shared = {key: value for key, value in loaded.typed.items() if key not in ("oialr", "dense")}
        layers += [("dense", loaded.config.dense), (COMMAND_LINE, shared)]
        layers.append((COMMAND_LINE, loaded.typed.get("dense") or {}))
    return from_trees([*layers, ("dense", {"oialr": None})])


def make_parser(prog: str) -> jsonargparse.ArgumentParser:
    """jsonargparse's view of :class:`RunConfig`: types, defaults and help of every setting."""
    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False)
    parser.add_class_arguments(RunConfig, None, fail_untyped=True)
    return parser


def _build(hint: Any, value: Any, origins: Mapping[str, str], name: str = "") -> Any:
    """The object of a normalised tree.

    jsonargparse converts single values; of a whole tree it lets null pass everywhere, and anything inside a
    required choice of type.

    Raises
    ------
    ConfigError
        For the first value that is missing, of another type or out of its range, with its full name and origin.
    """
    cls = section_type(hint)
    if cls is None or value is None:
        return _leaf(hint, value, name, origins.get(name))
    if is_choice(cls):
        cls, value = find_choice(cls, value["class_path"], name), value["init_args"]
    hints, prefix = field_types(cls), f"{name}." if name else ""
    for each in dataclasses.fields(cls):
        needed = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        given = each.name in value and (value[each.name] is not None or _optional(hints[each.name]))
        if each.init and needed and not given:
            family = section_type(hints[each.name])
            valid = f"; valid: {', '.join(sorted(choices(family)))}" if family and is_choice(family) else ""
            full = f"{prefix}{each.name}"
            raise ConfigError(full, None, f"must be set{valid}", origin=origins.get(full))
    settings = {key: _build(hints[key], item, origins, f"{prefix}{key}") for key, item in value.items()}
    try:
        return cls(**settings)
    except ConfigError as error:
        raise in_section(error, name, origins) from None


def _as_tree(value: Any, hint: Any) -> Any:
    """Every setting of an object, defaults included, as plain values."""
    cls = section_type(hint)
    if cls is None or value is None:
        return list(value) if isinstance(value, tuple) else value
    hints = field_types(type(value))
    settings = {key: _as_tree(getattr(value, key), hints[key]) for key in hints}
    return {"class_path": short_path(type(value)), "init_args": settings} if is_choice(cls) else settings


def _leaf(hint: Any, value: Any, name: str, origin: str | None) -> Any:
    misfit = ConfigError(name, value, f"must be {_type_name(hint)}", origin=origin)
    if value is None:
        if not _optional(hint):
            raise misfit
        return None
    try:
        converted = _leaf_parser(hint).parse_object({"value": value})["value"]
    except (ArgumentError, OverflowError):
        raise misfit from None
    given, found = (each if isinstance(each, list | tuple) else [each] for each in (value, converted))
    if any(isinstance(a, str) and not isinstance(b, str) for a, b in zip(given, found, strict=False)):
        # jsonargparse reads words again, by YAML 1.1, where 1:30 is 90.
        raise misfit
    for number in found:
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError(name, value, "must be a finite number", origin=origin)
        if isinstance(number, int) and abs(number) > LARGEST:
            raise ConfigError(name, value, f"must not go beyond {LARGEST}", origin=origin)
    return converted


@cache
def _leaf_parser(hint: Any) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _type_name(hint: Any) -> str:
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, typing.get_args(hint)))
    return hint.__name__ if isinstance(hint, type) else str(hint)
