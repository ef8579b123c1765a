"""Settings as text: the YAML of recipes, and ``--section.field value`` on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from hpc_oialr.errors import OIALRError

Tree = dict[str, Any]

_INT, _FLOAT, _DATE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "timestamp"))
_NUMBERS = {
    _INT: r"^[-+]?(\d[\d_]*|0x[\da-fA-F_]*[\da-fA-F]|0o[0-7_]*[0-7]|0b[01_]*[01])$",
    _FLOAT: r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$",
}
# No setting is of these types; a set, for one, has no order.
_REFUSED = ("set", "omap", "pairs", "binary", "timestamp")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers, no dates, and no key twice.

    PyYAML takes 1e-3 for a word, 010 for 8, 1:30 for 90, and the last of two keys.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key.value, str)):
            if key.value in seen:
                problem = f"{key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 0 if text.lstrip("+-")[:2] in ("0x", "0o", "0b") else 10)


class _Dumper(yaml.SafeDumper):
    """Quotes every word that :class:`_Loader` or PyYAML would take for something else."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT, _DATE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    for _each in (_Loader, _Dumper):
        _each.add_implicit_resolver(_tag, re.compile(_pattern), list("-+0123456789."))
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] not in _REFUSED
}
_Loader.add_constructor(_INT, _Loader.construct_whole_number)


def read_yaml(text: str) -> Any:
    """The value of a YAML text, safe types only; ``yaml.YAMLError`` for whatever is wrong with it."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        # PyYAML's constructors let these out: `!!int x`, a number of 5,000 digits, brackets without end.
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def write_yaml(tree: Tree) -> str:
    """A text from which :func:`read_yaml` makes the same tree."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False))


def parse_settings(arguments: Sequence[str]) -> Tree:
    """``["--train.steps", "20", "--oialr=null"]`` -> ``{"train": {"steps": 20}, "oialr": None}``.

    Values are YAML. The last one of several for a setting counts. Raises :class:`OIALRError` for an argument that is
    no setting, and for a setting without a value.
    """
    tree: Tree = {}
    rest = list(arguments)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if not name.startswith("--") or len(name) == 2:
            raise OIALRError(f"unexpected argument {name!r}; settings have the form --section.field value.")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise OIALRError(f"{name} has no value; settings have the form --section.field value.")
            text = rest.pop(0)
        try:
            value = read_yaml(text)
        except yaml.YAMLError:
            origin = "(from the command line)"
            raise OIALRError(f"{name} is {text!r} {origin}, which is no valid YAML value.") from None
        _put(tree, name[2:].split("."), value)
    return tree


def _put(tree: Tree, path: list[str], value: Any) -> None:
    """Set a leaf; a choice given by name and settings of it become one mapping."""
    for key in path[:-1]:
        inner = tree.setdefault(key, {})
        if not isinstance(inner, dict):
            inner = tree[key] = {"class_path": inner} if isinstance(inner, str) else {}
        tree = inner
    if isinstance(tree.get(path[-1]), dict) and isinstance(value, str):
        tree[path[-1]]["class_path"] = value
    else:
        tree[path[-1]] = value
