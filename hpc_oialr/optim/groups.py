"""Replaces weights by cores, and cores by weights, in an optimizer's groups and state."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hpc_oialr.lowrank import LowRankWeight, low_rank_layers
from hpc_oialr.lowrank.attention import PROJECTIONS, FactorisedMultiheadAttention
from hpc_oialr.optim.stack import OptimizerStack


def replace_parameter(stack: OptimizerStack, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put ``new`` in the place of ``old`` with its state; a first core goes to the group for cores.

    Only an optimizer with a group marked ``"cores"`` has such a group, see :class:`hpc_oialr.MuonAdamW`; in every
    other one the groups keep their order and length. A basis stays in its group.
    """
    leaf, home = stack.home(old)
    cores = next((group for group in leaf.param_groups if group.get("cores")), home)
    if home.get("bases"):
        cores = home
    if cores is not home:
        home["params"] = [p for p in home["params"] if p is not old]
        cores["params"].append(new)
    for group in stack.groups():
        if any(p is old for p in group["params"]):
            group["params"] = [new if p is old else p for p in group["params"]]
    for _, states in stack.states():
        state = states.pop(old, None)
        if state and cores is not home and cores["algorithm"] == "muon" and "exp_avg" in state:
            # From AdamW to Muon: the first moment becomes the momentum.
            state = {"momentum_buffer": state["exp_avg"]}
        if state:
            states[new] = state
    stack.replace(old, new)


def order_cores(stack: OptimizerStack, order: Sequence[nn.Parameter], bases: Sequence[nn.Parameter] = ()) -> None:
    """Sort the group for cores, and ``bases`` at the end of theirs, independent of the order of conversions."""
    position = {id(p): i for i, p in enumerate(order)}
    last = {id(p): i for i, p in enumerate(bases)}
    for group in stack.groups():
        if group.get("cores"):
            group["params"].sort(key=lambda p: position.get(id(p), len(position)))
        # A stable sort: all others stay as they are.
        group["params"].sort(key=lambda p: last.get(id(p), -1))


class GroupPlaces:
    """Replaces parameters in an optimizer, and remembers where the first of each stood.

    A core moves from its weight's group to one marked ``"cores"``, if there is one; a weight that is dense again gets
    its old place, so that the order is that of a model which never was low-rank.
    """

    def __init__(self, stack: OptimizerStack, model: nn.Module) -> None:
        self._stack = stack
        # The place of each parameter in the dense model; a core's is its weight's.
        ordered = (p for module in model.modules() for p in _dense_order(module) if p is not None)
        order = {p: place for place, p in enumerate(dict.fromkeys(ordered))}
        if low_rank_layers(model):
            _leave_out_bases(stack, model, order)
        self._places: dict[nn.Parameter, tuple[int, int]] = {}
        for leaf in stack.leaves:
            groups = leaf.param_groups
            for index, group in enumerate(groups):
                self._places |= {p: (index, place) for place, p in enumerate(group["params"])}
            # Weights whose cores are in the group for cores already belong to the first of the others.
            cores = [p for group in groups if group.get("cores") for p in group["params"]]
            home = next((i for i, group in enumerate(groups) if not group.get("cores")), None)
            if cores and home is not None:
                both = sorted([*groups[home]["params"], *cores], key=lambda p: order[p])
                self._places |= {p: (home, place) for place, p in enumerate(both)}

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Put ``new`` in the place of ``old``."""
        replace_parameter(self._stack, old, new)
        if old in self._places:
            self._places[new] = self._places.pop(old)

    def add_bases(self, core: nn.Parameter, bases: Sequence[nn.Parameter]) -> None:
        """Hold ``U`` and ``Vh`` of a core too, in the group marked ``"bases"``, else in that of its weight.

        Without a gradient they are not stepped.
        """
        leaf, _ = self._stack.home(core)
        weights = leaf.param_groups[self._places[core][0]]
        group = next((group for group in leaf.param_groups if group.get("bases")), weights)
        held = {id(p) for p in group["params"]}
        group["params"] = [*group["params"], *(p for p in bases if id(p) not in held)]

    def remove_bases(self, bases: Sequence[nn.Parameter]) -> None:
        """Forget bases and their state, as their weight is dense again."""
        gone = {id(p) for p in bases}
        for group in self._stack.groups():
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for _, states in self._stack.states():
            for p in bases:
                states.pop(p, None)

    def take_back(self, core: nn.Parameter, weight: nn.Parameter) -> None:
        """Put a dense weight back where it stood before it became ``core``; under another algorithm without state."""
        self.replace(core, weight)
        leaf, now = self._stack.home(weight)
        if not now.get("cores"):
            return
        home = leaf.param_groups[self._places[weight][0]]
        now["params"] = [p for p in now["params"] if p is not weight]
        home["params"].append(weight)
        home["params"].sort(key=lambda p: self._places.get(p, (0, len(self._places)))[1])
        if home["algorithm"] != now["algorithm"]:
            for _, states in self._stack.states():
                states.pop(weight, None)


def _leave_out_bases(stack: OptimizerStack, model: nn.Module, order: dict[nn.Parameter, int]) -> None:
    """Take frozen ``U`` and ``Vh`` out of groups, and order these as if the model had been dense when they were made.

    So the state of an optimizer that was there before the conversion fits one made from the low-rank model.
    """
    if stack.partitioned:
        return
    layers = low_rank_layers(model).values()
    bases = {id(p) for layer in layers if not layer.bases_trained for p in (layer.U, layer.Vh)}
    here = {p: place for place, p in enumerate(model.parameters())}
    for group in stack.groups():
        params = [p for p in group["params"] if id(p) not in bases]
        if len(params) < len(group["params"]):
            places = [here[p] for p in params]
            group["params"][:] = sorted(params, key=lambda p: order[p]) if places == sorted(places) else params


def _dense_order(module: nn.Module) -> list[nn.Parameter | None]:
    own = list(module._parameters.values())
    if isinstance(module, LowRankWeight):
        return [module.S, *own]
    if isinstance(module, FactorisedMultiheadAttention):
        inside = [child for name in PROJECTIONS.values() if (child := module._modules.get(name)) is not None]
        return [p for child in inside for p in _dense_order(child)[:1]] + own
    return own
