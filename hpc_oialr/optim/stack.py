"""An optimizer and the optimizers inside it, wherever a parameter must be replaced by another."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Set
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from hpc_oialr.errors import ModelError
from hpc_oialr.optim.state_kinds import INSTEAD, Kind, kind_of, kinds_of, refusal

Group = dict[str, Any]
State = MutableMapping[Any, dict[str, Any]]

OWN_LISTS = ("LBFGS", "ZeroRedundancyOptimizer")
_NO_LISTS = ("param_groups", "state", "defaults")
_DEPTH = 4


class OptimizerStack:
    """Every optimizer that a user's optimizer consists of.

    Given is an optimizer, a list of them, or a wrapper that has one, or a list or dictionary of them, in an attribute.
    Raises :class:`ModelError` if the state of one cannot be transformed, or its inner optimizer is not found.
    """

    def __init__(self, optimizer: Any) -> None:
        self.nodes: list[Any] = []  # the given one and all inside it, outermost first
        self.leaves: list[Optimizer] = []  # those without an inner optimizer: they do the steps
        for each in optimizer if isinstance(optimizer, (list, tuple)) and optimizer else [optimizer]:
            self._descend(each)
        for node in self.nodes:
            _check_class(node)
        for leaf in self.leaves:
            # OIALR scales the steps of cores in the optimizer's own hooks, which must exist and be called.
            hooked = isinstance(leaf, Optimizer) and hasattr(leaf, "_optimizer_step_pre_hooks")
            if not hooked or not getattr(type(leaf).step, "hooked", False):
                raise ModelError(
                    f"the optimizer {type(leaf).__name__} does not behave as a torch.optim.Optimizer (no step hooks): it "
                    "is a wrapper whose inner optimizer was not found, or does not call super().__init__(). Pass the "
                    "optimizer itself, the one made from model.parameters(); inner optimizers are looked for in a "
                    "wrapper's attributes, and in lists and dictionaries there."
                )

    def _descend(self, node: Any) -> None:
        if any(node is other for other in self.nodes):
            return
        self.nodes.append(node)
        values = [value for key, value in getattr(node, "__dict__", {}).items() if key not in _NO_LISTS]
        inside = [each for value in values for each in _members(value) if each is not node and _steps(each)]
        if not inside:
            self.leaves.append(node)
        for inner in inside:
            self._descend(inner)

    @property
    def partitioned(self) -> bool:
        """Whether each rank steps only some of the parameters."""
        return any(_is(node, "ZeroRedundancyOptimizer") for node in self.nodes)

    def groups(self) -> list[Group]:
        """Parameter groups, each once, of the outermost optimizer first."""
        return _each_once(group for node in self.nodes for group in node.param_groups)

    def states(self) -> list[tuple[Any, State]]:
        """Mappings from parameters to state, each once, with the innermost optimizer that has it."""
        found: dict[int, tuple[Any, State]] = {}
        for node in reversed(self.nodes):
            state = getattr(node, "state", None)
            if isinstance(state, MutableMapping):
                # ZeroRedundancyOptimizer loads None for what other ranks step.
                if self.partitioned:
                    for key in [key for key, value in state.items() if value is None]:
                        del state[key]
                found.setdefault(id(state), (node, state))
        return list(found.values())

    def kind(self, node: Any, key: str) -> Kind | None:
        """Meaning of a key in the state of ``node``, into which those around it may write too; or None."""
        of_outer = (kinds_of(other)[key] for other in self.nodes if key in kinds_of(other))
        return kinds_of(node).get(key) or next(of_outer, None) or kind_of(node, key)

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of all groups, each once."""
        return _each_once(p for group in self.groups() for p in group["params"])

    def home(self, parameter: nn.Parameter) -> tuple[Optimizer, Group]:
        """The innermost optimizer and the group that hold a parameter; raises :class:`ModelError` if none does.

        Under ``ZeroRedundancyOptimizer`` another rank's parameter is in the outer groups only.
        """
        for node in [*self.leaves, *self.nodes]:
            for group in node.param_groups:
                if any(p is parameter for p in group["params"]):
                    leaf = node if node in self.leaves else OptimizerStack(node).leaves[0]
                    return leaf, group
        names = " around ".join(type(node).__name__ for node in self.nodes)
        raise ModelError(
            f"a trained weight or core of shape {tuple(parameter.shape)} is in no group of the optimizer ({names}): "
            "the optimizer was made anew, or its groups were changed, behind OIALR's back. Keep the optimizer that was "
            "given to OIALR(...), or make a new OIALR(...) with the new one."
        )

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Put ``new`` wherever the optimizers list ``old`` beside their groups and state."""
        for node in self.nodes:
            if isinstance(node, LBFGS):
                node._numel_cache = None
            for key, value in vars(node).items():
                if key not in ("param_groups", "state"):
                    _swap(value, old, new, _DEPTH)

    def check_lists(self, weights: dict[nn.Parameter, str]) -> None:
        """Raise :class:`ModelError` if an optimizer keeps one of ``weights`` (with names), or a copy, elsewhere."""
        names = {id(p): name for p, name in weights.items()}
        shapes = {tuple(p.shape): name for p, name in weights.items() if p.dim() > 1}
        for node in self.nodes:
            if any(_is(node, known) for known in OWN_LISTS):
                continue
            for place, value in _places(node):
                for found in tensors_in(value):
                    name = names.get(id(found)) or shapes.get(tuple(found.shape))
                    if name is not None:
                        what = "the weight" if id(found) in names else "a tensor of the shape"
                        raise ModelError(
                            f"{type(node).__name__} keeps {what} of {name} in {place}, where it would stay dense when "
                            "OIALR replaces the weight. "
                            f"Use an optimizer that finds its parameters in param_groups and state; {INSTEAD}."
                        )


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, (list, tuple)) else [value]


def _steps(value: Any) -> bool:
    return hasattr(value, "param_groups") and callable(getattr(value, "step", None))


def _is(node: Any, name: str) -> bool:
    return any(kind.__name__ == name for kind in type(node).__mro__)


def _check_class(node: Any) -> None:
    name = type(node).__name__
    if not _steps(node):
        raise ModelError(
            f"the optimizer is a {name}, which has no param_groups and step(). Pass the optimizer itself, made from "
            "model.parameters()."
        )
    reason = refusal(node)
    if reason is not None:
        raise ModelError(
            f"{name} {reason}; that cannot follow a weight through W = U S Vh. {INSTEAD}. If this {name}'s state has "
            f"the parameter's shape, say what it means: hpc_oialr.register_optimizer_state({name}, {{...}})."
        )
    if _is(node, "ZeroRedundancyOptimizer"):
        for option in ("_overlap_with_ddp", "parameters_as_bucket_view"):
            if getattr(node, option, False):
                raise ModelError(
                    f"ZeroRedundancyOptimizer with {option.lstrip('_')}=True keeps buckets of the dense weights; "
                    f"must be False, because OIALR replaces them."
                )
        if any(group.get("cores") for group in node.param_groups):
            raise ModelError(
                "ZeroRedundancyOptimizer cannot distribute a group of cores that is still empty; use FSDP to shard "
                "Muon's state, or the same learning rate for dense weights and cores (torch.optim.Muon)."
            )


def _places(node: Any) -> Iterator[tuple[str, Any]]:
    """Attributes, options of groups and global state: where lists of parameters would be."""
    for key, value in vars(node).items():
        if key not in _NO_LISTS and not any(map(_steps, _members(value))):
            yield f"its attribute {key!r}", value
    for group in node.param_groups:
        for key, value in group.items():
            if key != "params":
                yield f"its groups' {key!r}", value
    for key, value in list(getattr(node, "state", {}).items()):
        if not isinstance(key, Tensor):
            yield f"its state[{key!r}]", value


def tensors_in(value: Any, depth: int = _DEPTH, *, objects: bool = False) -> Iterator[Tensor]:
    """Tensors in nested containers, and in the attributes of ``objects``."""
    if isinstance(value, Tensor):
        yield value
        return
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, Set, deque)):
        items = list(value)
    elif objects and hasattr(value, "__dict__"):
        items = list(vars(value).values())
    for item in items if depth else ():
        yield from tensors_in(item, depth - 1, objects=objects)


def _swap(value: Any, old: nn.Parameter, new: nn.Parameter, depth: int) -> None:
    """Replace ``old`` in place in nested lists and dictionaries, in values and keys."""
    if not depth or not isinstance(value, (list, dict)):
        return
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        if item is old:
            value[key] = new
        else:
            _swap(item, old, new, depth - 1)
    if isinstance(value, dict) and any(key is old for key in value):
        # In the old one's place: the order may be that of the parameters.
        items = [(new if key is old else key, item) for key, item in value.items()]
        value.clear()
        value.update(items)


def _each_once(items: Iterable[Any]) -> list[Any]:
    return list({id(item): item for item in items}.values())
