"""From a recipe and the command line to a checked :class:`RunConfig`: defaults < recipe < command line.

Settings are a tree of plain values. A choice of type is a mapping with ``class_path`` and ``init_args``, as jsonargparse
writes it; on the way in the class name alone, or its settings without ``init_args``, will do.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import math
import types
import typing
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from hpc_oialr.errors import ConfigError, OIALRError, UnknownNameError
from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.recipes import find_recipe
from hpc_oialr.system_errors import read_text
from hpc_oialr.train.command_line import Tree, parse_settings, read_yaml, write_yaml
from hpc_oialr.train.config import RunConfig
from hpc_oialr.train.optimizers import MuonAdamW

COMMAND_LINE = "the command line"
# The largest seed of torch and NumPy.
LARGEST = 2**64 - 1
# Settings of earlier versions that have no effect any more, and why: old recipes and run folders hold them.
RETIRED = {
    "record.side_folder": "while the disk is full spectra wait in memory",
    "record.tensorboard": "record.tracker: tensorboard is what writes events",
    "record.spectra_writer": "rank 0 writes all spectra",
}
# Sections with settings of other runs of a recipe, its dense baseline and the published method, and what these lack.
VARIANTS = {"dense": ("oialr", "dense", "paper"), "paper": ("dense", "paper")}
# What true and false mean: YAML 1.1 reads "on" and "off" as such, and earlier versions wrote them.
SWITCHES = {
    "compile": {False: "off", True: "model"},
    "train.cuda_graph": {False: "off", True: "on"},
    "train.channels_last": {False: "off", True: "on"},
}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedConfig:
    """A run's settings, checked."""

    config: RunConfig
    tree: Tree  # every setting, defaults included, as plain values
    origins: Mapping[str, str]  # where each given setting came from, by dotted name
    typed: Tree = field(default_factory=dict)  # what the command line gave, as plain values

    @property
    def text(self) -> str:
        """The effective settings as YAML."""
        return write_yaml(self.tree)


def load_config(recipe: str | Path, arguments: Sequence[str] = ()) -> LoadedConfig:
    """Read a recipe by name, or a YAML file, with the settings of the command line on top.

    UnknownNameError for an unknown recipe, setting or type lists the valid ones; ConfigError for a value of the wrong
    type or out of its range names its origin.
    """
    path = find_recipe(recipe)
    try:
        raw = read_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise OIALRError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    typed = parse_settings(arguments)
    return dataclasses.replace(_from_layers([(path.name, raw), (COMMAND_LINE, typed)]), typed=typed)


def dense_twin(loaded: LoadedConfig, *, own: bool) -> LoadedConfig:
    """The same run without the method; with the recipe's ``dense`` settings if ``own``.

    Settings of the command line override them: ``--train.epochs 4`` is 4 epochs on both sides, and
    ``--dense.train.epochs 4`` on this one.
    """
    layers: list[tuple[str, Tree]] = [("config.yaml", {**loaded.tree, "dense": None, "paper": None})]
    if own and loaded.config.dense:
        shared = {key: value for key, value in loaded.typed.items() if key not in ("oialr", *VARIANTS)}
        layers += [("dense", loaded.config.dense), (COMMAND_LINE, shared)]
        layers.append((COMMAND_LINE, loaded.typed.get("dense") or {}))
    return _from_layers([*layers, ("dense", {"oialr": None})])


def paper_variant(loaded: LoadedConfig) -> LoadedConfig:
    """The same run by the published method: :meth:`OIALRConfig.paper`, and the recipe's ``paper`` settings.

    Of the recipe's settings of the method ``delay``, ``frequency`` and ``selection`` stay; its ``dense`` ones, which
    belong to another optimizer, do not. Settings of the command line override all, as in :func:`dense_twin`.

    Raises ConfigError if there is no method, or an optimizer that the paper does not use.
    """
    method = loaded.config.oialr
    if method is None:
        raise ConfigError("oialr", None, "trains dense, and has no published variant", fix="Leave out --paper.")
    kept = {name: getattr(method, name) for name in ("delay", "frequency", "selection")}
    published = _as_tree(OIALRConfig.paper(**kept), OIALRConfig)
    shared = {key: value for key, value in loaded.typed.items() if key != "paper"}
    layers: list[tuple[str, Tree]] = [
        ("config.yaml", {**loaded.tree, "oialr": None, "dense": None, "paper": None}),
        ("paper", {"oialr": published}),
        ("paper", loaded.config.paper or {}),
        (COMMAND_LINE, shared),
        (COMMAND_LINE, loaded.typed.get("paper") or {}),
    ]
    found = dataclasses.replace(_from_layers(layers), typed=shared)
    if isinstance(found.config.optimizer, MuonAdamW):
        rule = "trains cores by Muon, and the published method by AdamW"
        fix = "Set another, e.g. --paper.optimizer AdamW --paper.optimizer.lr 1e-3."
        raise ConfigError("optimizer", "MuonAdamW", rule, fix=fix)
    return found


def make_parser(prog: str) -> jsonargparse.ArgumentParser:
    """A parser whose help shows type, default and meaning of every setting of :class:`RunConfig`."""
    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False)
    parser.add_class_arguments(RunConfig, None, fail_untyped=True)
    return parser


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every setting by its dotted name, ``init_args`` left out, as on the command line.

    Examples
    --------
    >>> flat({"train": {"steps": 3}, "engine": {"class_path": "DDP", "init_args": {"size": 2}}})
    {'train.steps': 3, 'engine.class_path': 'DDP', 'engine.size': 2}
    """
    named: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix.removesuffix(".") if key == "init_args" else f"{prefix}{key}"
        named |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return named


def _from_layers(layers: Sequence[tuple[str, Any]]) -> LoadedConfig:
    """Merge trees, each with the name of its origin, later ones on top, and check the result."""
    origins: dict[str, str] = {}
    retired: list[str] = []
    merged: Tree = {}
    variants: dict[str, Tree] = {name: {} for name in VARIANTS}
    for origin, raw in layers:
        layer = _Layer(origin, origins, retired)
        own = {k: v for k, v in raw.items() if k not in VARIANTS} if isinstance(raw, Mapping) else raw
        merged = _merge(merged, layer.section(own, RunConfig, merged))
        for name, without in VARIANTS.items():
            section = (raw.get(name) if isinstance(raw, Mapping) else None) or {}
            for inner in without:
                if isinstance(section, Mapping) and section.get(inner) is not None:
                    rule = f"has no effect: the {'dense baseline' if name == 'dense' else 'published variant'} has none"
                    raise ConfigError(f"{name}.{inner}", section[inner], rule, origin=origin)
            base = _merge(merged, variants[name])
            variants[name] = _merge(variants[name], layer.section(section, RunConfig, base, name))
    if retired:
        log.warning("settings that no longer have an effect are ignored: %s", ", ".join(retired))
    config = _build(RunConfig, merged, origins)
    config.dense, config.paper = (variants[name] or None for name in VARIANTS)
    return LoadedConfig(config, {**_as_tree(config, RunConfig), "dense": config.dense, "paper": config.paper}, origins)


def _merge(base: Any, over: Any) -> Any:
    """``over`` on top of ``base``, both normalised; another choice of type starts from its own defaults."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    if base.get("class_path") != over.get("class_path"):
        return over
    return {**base, **{key: _merge(base.get(key), value) for key, value in over.items()}}


@dataclass
class _Layer:
    """Checks every key of a tree and brings choices into the form ``class_path``, ``init_args``."""

    origin: str
    origins: dict[str, str]  # filled: the origin of every setting, by its dotted name without init_args
    retired: list[str]  # filled: settings of RETIRED, which are left out

    def section(self, raw: Any, cls: type, base: Any, name: str = "") -> Tree:
        """The settings of the dataclass ``cls``; ``base`` is what they will be merged into."""
        if not isinstance(raw, Mapping):
            raise ConfigError(name or "the run", raw, "must be a mapping of settings", origin=self.origin)
        prefix, hints, settings = f"{name}." if name else "", _field_types(cls), {}
        base = base if isinstance(base, Mapping) else {}
        for key, value in raw.items():
            full = f"{prefix}{key}"
            plain = full.partition(".")[2] if name.partition(".")[0] in VARIANTS else full
            if reason := RETIRED.get(plain):
                self.retired.append(f"{full} from {self.origin} ({reason})")
                continue
            if key not in hints:
                valid = [f"{prefix}{k}" for k in hints]
                raise UnknownNameError("setting", full, valid, origin=self.origin)
            self.origins[full] = self.origin
            if isinstance(value, bool) and (words := SWITCHES.get(plain)):
                value = words[value]
            inner = _section_type(hints[key])
            if inner is None or value is None:
                settings[key] = value
            elif inspect.isabstract(inner):
                default = next(f.default_factory for f in dataclasses.fields(cls) if f.name == key)
                chosen = None if default is MISSING else type(default()).__name__
                settings[key] = self.choice(value, inner, chosen, base.get(key), full)
            else:
                settings[key] = self.section(value, inner, base.get(key), full)
        return settings

    def choice(self, raw: Any, family: type, default: str | None, base: Any, name: str) -> Tree:
        """One type of a family, by default that of ``base``, with its settings."""
        raw = {"class_path": raw} if isinstance(raw, str) else raw
        if not isinstance(raw, Mapping):
            rule = f"must be one of {', '.join(sorted(_choices(family)))}"
            raise ConfigError(name, raw, rule, origin=self.origin)
        base = base if isinstance(base, Mapping) else {}
        path = raw.get("class_path", base.get("class_path", default))
        if path is None:
            rule = f"needs a class_path, one of {', '.join(sorted(_choices(family)))}"
            raise ConfigError(name, dict(raw), rule, origin=self.origin)
        cls = _find_choice(family, path, name, self.origin)
        given = raw.get("init_args") or {}
        if not isinstance(given, Mapping):
            rule = "must be a mapping of settings"
            raise ConfigError(f"{name}.init_args", given, rule, origin=self.origin)
        settings = {k: v for k, v in raw.items() if k not in ("class_path", "init_args")} | dict(given)
        inner = base.get("init_args") if base.get("class_path") == _short_path(cls) else {}
        return {"class_path": _short_path(cls), "init_args": self.section(settings, cls, inner, name)}


# -- from a tree to objects, and back ------------------------------------------------------------


def _build(hint: Any, value: Any, origins: Mapping[str, str], name: str = "") -> Any:
    """The object of a normalised tree.

    jsonargparse converts single values only: in a whole tree it lets null pass everywhere, and anything inside a
    required choice of type. Raises for the first value that is missing, of another type or out of its range.
    """
    cls = _section_type(hint)
    if cls is None or value is None:
        return _leaf(hint, value, name, origins.get(name))
    if inspect.isabstract(cls):
        cls, value = _find_choice(cls, value["class_path"], name), value["init_args"]
    hints, prefix = _field_types(cls), f"{name}." if name else ""
    for each in dataclasses.fields(cls):
        required = each.init and each.default is MISSING and each.default_factory is MISSING
        null_given = each.name in value and _optional(hints[each.name])
        if required and value.get(each.name) is None and not null_given:
            family, full = _section_type(hints[each.name]), f"{prefix}{each.name}"
            abstract = family is not None and inspect.isabstract(family)
            valid = f"; valid: {', '.join(sorted(_choices(family)))}" if family and abstract else ""
            raise ConfigError(full, None, f"must be set{valid}", origin=origins.get(full))
    settings = {key: _build(hints[key], item, origins, f"{prefix}{key}") for key, item in value.items()}
    try:
        return cls(**settings)
    except ConfigError as error:
        raise error.in_section(name, origins) from None


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


def _as_tree(value: Any, hint: Any) -> Any:
    """Every setting of an object, defaults included, as plain values."""
    cls = _section_type(hint)
    if cls is None or value is None:
        return list(value) if isinstance(value, tuple) else value
    settings = {key: _as_tree(getattr(value, key), inner) for key, inner in _field_types(type(value)).items()}
    if inspect.isabstract(cls):
        return {"class_path": _short_path(type(value)), "init_args": settings}
    return settings


# -- types of settings ---------------------------------------------------------------------------


def _section_type(hint: Any) -> type | None:
    """The dataclass or the family of choices (an abstract class) in a field's type; None for a plain value."""
    for option in (hint, *typing.get_args(hint)):
        if inspect.isclass(option) and (dataclasses.is_dataclass(option) or inspect.isabstract(option)):
            return option
    return None


def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _choices(family: type) -> dict[str, type]:
    """The package's concrete types of a family by name; others are chosen by their full path."""
    found: dict[str, type] = {}
    cls: type
    for cls in family.__subclasses__():
        found |= _choices(cls)
        if not inspect.isabstract(cls) and cls.__module__.startswith("hpc_oialr."):
            found[cls.__name__] = cls
    return found


def _find_choice(family: type, path: Any, name: str, origin: str | None = None) -> type:
    """The type called ``path``: a name of this package, or a full dotted path to the user's own."""
    valid = _choices(family)
    module, _, short = str(path).rpartition(".")
    if module:
        try:
            found = getattr(importlib.import_module(module), short, None)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise ConfigError(name, path, f"cannot be imported ({error})", origin=origin) from None
            found = None
        except Exception as error:
            rule = f"cannot be imported ({type(error).__name__}: {error})"
            raise ConfigError(name, path, rule, origin=origin) from error
        if inspect.isclass(found) and issubclass(found, family) and not inspect.isabstract(found):
            return found
    elif short in valid:
        return valid[short]
    raise UnknownNameError(f"{name} type", str(path), valid, origin=origin)


def _short_path(cls: type) -> str:
    """How a type is written: by its name alone if it is this package's."""
    return cls.__name__ if cls.__module__.startswith("hpc_oialr.") else f"{cls.__module__}.{cls.__name__}"


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
