"""From a recipe and the command line to a checked :class:`RunConfig`: YAML < command line."""

from __future__ import annotations

import dataclasses
import math
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
    build,
    choices,
    field_types,
    find_choice,
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
    _require(merged)
    typed = _typed(merged, origins)
    loaded = LoadedConfig(build(RunConfig, typed, origins), {**typed, "dense": dense or None}, origins)
    loaded.config.dense = dense or None
    return loaded


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


def _typed(tree: Tree, origins: Mapping[str, str]) -> Tree:
    """Every setting, defaults included, each converted to its type; plain containers."""
    try:
        namespace = make_parser("oialr train").parse_object(_converted(tree, RunConfig, origins))
    except ArgumentError as error:
        raise OIALRError(" ".join(str(error).split())) from None
    plain = _plain(namespace.as_dict(), RunConfig)
    assert isinstance(plain, dict)
    return plain


def _converted(tree: Tree, cls: type, origins: Mapping[str, str], prefix: str = "") -> Tree:
    """The given settings in their types; :class:`ConfigError` for the first that is not of its field's.

    jsonargparse alone lets null pass everywhere, and anything inside a required choice of type.
    """
    hints, result = field_types(cls), {}
    for key, value in tree.items():
        section, name = section_type(hints[key]), f"{prefix}{key}"
        if section is None or not isinstance(value, dict):
            result[key] = _leaf(hints[key], value, name, origins.get(name))
        elif is_choice(section):
            chosen = find_choice(section, value["class_path"], name)
            settings = _converted(value["init_args"], chosen, origins, f"{name}.")
            result[key] = {"class_path": value["class_path"], "init_args": settings}
        else:
            result[key] = _converted(value, section, origins, f"{name}.")
    return result


def _leaf(hint: Any, value: Any, name: str, origin: str | None) -> Any:
    misfit = ConfigError(name, value, f"must be {_type_name(hint)}", origin=origin)
    if value is None:
        if type(None) not in typing.get_args(hint):
            raise misfit
        return None
    try:
        converted = _leaf_parser(hint).parse_object({"value": value})["value"]
    except (ArgumentError, OverflowError):
        raise misfit from None
    converted = list(converted) if isinstance(converted, tuple) else converted
    given, found = (each if isinstance(each, list) else [each] for each in (value, converted))
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


def _plain(value: Any, hint: Any) -> Any:
    """Short class names, lists for tuples."""
    cls = section_type(hint)
    if cls is not None and isinstance(value, dict):
        if is_choice(cls):
            chosen = find_choice(cls, value["class_path"], cls.__name__)
            return {
                "class_path": short_path(chosen),
                "init_args": _settings(value.get("init_args", {}), chosen),
            }
        return _settings(value, cls)
    return list(value) if isinstance(value, tuple) else value


def _settings(value: Tree, cls: type) -> Tree:
    hints = field_types(cls)
    return {key: _plain(item, hints[key]) for key, item in value.items()}


def _type_name(hint: Any) -> str:
    name = hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
    return name.replace("None", "null")


def _require(tree: Tree) -> None:
    for each in dataclasses.fields(RunConfig):
        needed = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if needed and tree.get(each.name) is None:
            family = section_type(field_types(RunConfig)[each.name])
            valid = ", ".join(sorted(choices(family))) if family and is_choice(family) else "settings"
            raise ConfigError(each.name, tree.get(each.name), f"must be set; valid: {valid}")
