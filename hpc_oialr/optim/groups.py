"""Where each parameter stood in the optimizer's groups, for weights that become dense again."""

from __future__ import annotations

from torch import nn

from hpc_oialr.optim.stack import OptimizerStack
from hpc_oialr.optim.state import replace_parameter


class GroupPlaces:
    """Replaces parameters in an optimizer, and remembers where the first of each stood.

    A core leaves its weight's group where there is one marked ``"cores"`` (see :class:`hpc_oialr.MuonAdamW`); a
    weight that comes back finds its place again, so that the order is that of a model which never was low-rank.
    """

    def __init__(self, stack: OptimizerStack) -> None:
        self._stack = stack
        self._places: dict[nn.Parameter, tuple[int, int]] = {
            p: (index, place)
            for leaf in stack.leaves
            for index, group in enumerate(leaf.param_groups)
            for place, p in enumerate(group["params"])
        }

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Put ``new`` in the place of ``old``."""
        replace_parameter(self._stack, old, new)
        if old in self._places:
            self._places[new] = self._places.pop(old)

    def take_back(self, core: nn.Parameter, weight: nn.Parameter) -> None:
        """Put a dense weight back where it stood before it became ``core``; another algorithm begins anew."""
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
