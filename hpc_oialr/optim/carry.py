"""Optimizer state through a change of variables ``W = U S Vh``, later ``S = P S' Qh``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.lowrank.layout import WHOLE, Whole

Project = Callable[[Tensor, Tensor, Tensor], Tensor]

# A first moment is linear in the gradient and moves exactly; a second moment holds squares and moves
# approximately, its entries taken as uncorrelated.
FIRST_MOMENTS = frozenset({"exp_avg", "momentum_buffer"})
SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq"})


def replace_parameter(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put ``new`` in the place of ``old`` and hand it the state; a first core goes to the group for cores.

    Only an optimizer with a group marked ``"cores"`` has such a place, see
    :class:`hpc_oialr.MuonAdamW`; in every other one the groups keep their order and length.
    """
    home = next(group for group in optimizer.param_groups if any(p is old for p in group["params"]))
    cores = next((group for group in optimizer.param_groups if group.get("cores")), home)
    if cores is home:
        home["params"] = [new if p is old else p for p in home["params"]]
    else:
        home["params"] = [p for p in home["params"] if p is not old]
        cores["params"].append(new)
    state = optimizer.state.pop(old, None)
    if state:
        optimizer.state[new] = state if home["params"] is cores["params"] else _for_group(state, cores)


def _for_group(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """The state another algorithm goes on with: AdamW's first moment is Muon's momentum."""
    if group["algorithm"] == "muon" and "exp_avg" in state:
        return {"momentum_buffer": state["exp_avg"]}
    return state


def order_cores(optimizer: Optimizer, order: Sequence[nn.Parameter]) -> None:
    """Sort the group for cores, so that it does not depend on who was converted first."""
    position = {id(p): i for i, p in enumerate(order)}
    for group in optimizer.param_groups:
        if group.get("cores"):
            group["params"].sort(key=lambda p: position.get(id(p), len(position)))


@exact_arithmetic()
def carry(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    left: Tensor,
    right: Tensor,
    *,
    layout: Whole = WHOLE,
    core: bool = False,
    reset: bool = False,
) -> None:
    """Move the state of a weight or a core into the basis of ``left`` and ``right``, in place of the old one.

    First moment ``M' = left^T M right^T``, second ``V' = (left o left)^T V (right o right)^T``.
    State of the parameter's shape under an unknown key is reset to zero with one warning that names
    it; step counters and other scalars stay.

    Parameters
    ----------
    left, right
        m x r and r x n: ``U`` and ``Vh`` at the conversion, ``P[:, :r']`` and ``Qh[:r']`` at an update;
        of ``U`` this process's rows.
    layout
        How the optimizer's state is stored, and the new one will be.
    core
        Whether ``parameter`` is a core.
    reset
        Zero the moments instead, as the published code does.
    """
    project = layout.project_core if core else layout.project
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.dim() >= 2 and value.shape == parameter.shape:
            moved = _move(key, value, left, right, project, reset)
            optimizer.state[parameter][key] = layout.put_core(moved.to(value.dtype).contiguous())


def _move(key: str, value: Tensor, left: Tensor, right: Tensor, project: Project, reset: bool) -> Tensor:
    if key in FIRST_MOMENTS and not reset:
        return project(value, left, right)
    if key in SECOND_MOMENTS and not reset:
        return project(value, left * left, right * right)
    if key not in FIRST_MOMENTS | SECOND_MOMENTS:
        _warn(key)
    return left.new_zeros(left.shape[1], right.shape[0])


def _warn(key: str) -> None:
    known = (
        f"{', '.join(sorted(FIRST_MOMENTS))} (first moments), {', '.join(sorted(SECOND_MOMENTS))} (second)"
    )
    warnings.warn(
        f"optimizer state {key!r} is of unknown meaning and is reset to zero when its parameter changes basis; "
        f"known: {known}",
        stacklevel=2,
    )


@exact_arithmetic()
def carry_average(value: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A running average of the weight (m x n, or the core r x r) in the new basis: ``left^T value right^T``."""
    return (left.mT @ (value.reshape(left.shape[0], right.shape[1]).to(left.dtype) @ right.mT)).to(
        value.dtype
    )
