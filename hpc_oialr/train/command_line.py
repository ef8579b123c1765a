"""Settings on the command line: ``--section.field value`` as a tree."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from hpc_oialr.errors import OIALRError
from hpc_oialr.train.config_tree import Tree


class Loader(yaml.SafeLoader):
    """YAML 1.2's numbers, no dates, and no key twice: PyYAML takes 1e-3 for a word, and the last of two keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As PyYAML's; raises for a key that is given twice."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key.value, str)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+0123456789."),
)


def read_yaml(text: str) -> Any:
    """The value of a YAML text; safe types only."""
    return yaml.load(text, Loader=Loader)


def parse_settings(arguments: Sequence[str]) -> Tree:
    """``["--train.steps", "20", "--oialr=null"]`` -> ``{"train": {"steps": 20}, "oialr": None}``.

    Values are YAML. The last one of several for a setting counts.

    Raises
    ------
    OIALRError
        For an argument that is no setting, or a setting without a value.
    """
    tree: Tree = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or len(name) == 2:
            raise OIALRError(f"unexpected argument {name!r}; settings have the form --section.field value.")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise OIALRError(f"{name} has no value; settings have the form --section.field value.")
            value = rest.pop(0)
        _put(tree, name[2:].split("."), _value(name, value))
    return tree


def _value(name: str, text: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        raise OIALRError(
            f"{name} is {text!r} (from the command line), which is no valid YAML value."
        ) from None


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
