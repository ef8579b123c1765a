"""Trees of settings: checked against the typed classes, merged, made into objects.

A choice of type is a mapping with ``class_path`` and ``init_args``, as jsonargparse writes it; on the way in
the class name alone, or its settings without ``init_args``, will do.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from hpc_oialr.errors import ConfigError, UnknownNameError

Tree = dict[str, Any]


def section_type(hint: Any) -> type | None:
    """The dataclass or family of choices in a field's type, or None for a plain value."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if inspect.isclass(option) and (dataclasses.is_dataclass(option) or is_choice(option)):
            return option
    return None


def is_choice(cls: type) -> bool:
    """Whether ``cls`` is abstract, so that one of its subclasses must be chosen."""
    return inspect.isabstract(cls)


def field_types(cls: type) -> dict[str, Any]:
    """Type of every setting of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def choices(family: type) -> dict[str, type]:
    """The package's concrete types of a family by name; others are chosen by their full path."""
    found: dict[str, type] = {}
    cls: type
    for cls in family.__subclasses__():
        found |= choices(cls)
        if not inspect.isabstract(cls) and cls.__module__.startswith("hpc_oialr."):
            found[cls.__name__] = cls
    return found


def find_choice(family: type, path: Any, name: str, origin: str | None = None) -> type:
    """The type called ``path``: a name of this package, or a full dotted path to your own.

    Raises
    ------
    UnknownNameError
        Listing the valid names.
    """
    valid = choices(family)
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


def default_choice(owner: type, field: str) -> type | None:
    """The type a field has when nothing is chosen."""
    for f in dataclasses.fields(owner):
        if f.name == field and f.default_factory is not dataclasses.MISSING:
            return type(f.default_factory())
    return None


class Normaliser:
    """Checks every key of a tree and brings choices into the form ``class_path``, ``init_args``.

    Parameters
    ----------
    origin
        Where the tree comes from, for messages.
    origins
        Takes the origin of every setting met, by its dotted name without ``init_args``.
    """

    def __init__(self, origin: str, origins: dict[str, str]) -> None:
        self.origin, self.origins = origin, origins

    def section(self, raw: Any, cls: type, base: Any, name: str = "") -> Tree:
        """The settings of the dataclass ``cls``; ``base`` is what they will be merged into."""
        if not isinstance(raw, Mapping):
            raise ConfigError(name or "the run", raw, "must be a mapping of settings", origin=self.origin)
        prefix, hints = f"{name}." if name else "", field_types(cls)
        base = base if isinstance(base, Mapping) else {}
        for key in raw:
            if key not in hints:
                valid = [f"{prefix}{k}" for k in hints]
                raise UnknownNameError("setting", f"{prefix}{key}", valid, origin=self.origin)
        return {
            key: self._value(value, cls, key, base.get(key), f"{prefix}{key}") for key, value in raw.items()
        }

    def _value(self, raw: Any, owner: type, key: str, base: Any, name: str) -> Any:
        self.origins[name] = self.origin
        cls = section_type(field_types(owner)[key])
        if cls is None or raw is None:
            return raw
        if is_choice(cls):
            return self._choice(raw, cls, default_choice(owner, key), base, name)
        return self.section(raw, cls, base, name)

    def _choice(self, raw: Any, family: type, default: type | None, base: Any, name: str) -> Tree:
        raw = {"class_path": raw} if isinstance(raw, str) else raw
        if not isinstance(raw, Mapping):
            raise ConfigError(
                name, raw, f"must be one of {', '.join(sorted(choices(family)))}", origin=self.origin
            )
        base = base if isinstance(base, Mapping) else {}
        path = raw.get("class_path", base.get("class_path", default and default.__name__))
        if path is None:
            rule = f"needs a class_path, one of {', '.join(sorted(choices(family)))}"
            raise ConfigError(name, dict(raw), rule, origin=self.origin)
        cls = find_choice(family, path, name, self.origin)
        given = raw.get("init_args") or {}
        if not isinstance(given, Mapping):
            raise ConfigError(f"{name}.init_args", given, "must be a mapping of settings", origin=self.origin)
        settings = {k: v for k, v in raw.items() if k not in ("class_path", "init_args")} | dict(given)
        inner = base.get("init_args") if base.get("class_path") == short_path(cls) else {}
        return {"class_path": short_path(cls), "init_args": self.section(settings, cls, inner, name)}


def short_path(cls: type) -> str:
    """How a type is written: by its name alone if it is this package's."""
    return cls.__name__ if cls.__module__.startswith("hpc_oialr.") else f"{cls.__module__}.{cls.__name__}"


def merge_trees(base: Any, over: Any) -> Any:
    """``over`` on top of ``base``, both normalised; another choice of type starts from its own defaults."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    if base.get("class_path") != over.get("class_path"):
        return over
    return {**base, **{key: merge_trees(base.get(key), value) for key, value in over.items()}}


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


def in_section(error: ConfigError, section: str, origins: Mapping[str, str] | None = None) -> ConfigError:
    """``error`` with its setting's full dotted name, and the origin if it is known."""
    parent, _, last = section.rpartition(".")
    if error.name.partition(".")[0] != last:
        parent = section
    prefix = f"{parent}." if parent else ""
    return error.with_context(prefix=prefix, origin=(origins or {}).get(f"{prefix}{error.name}"))
