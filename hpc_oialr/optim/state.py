"""Optimizer state through a change of variables ``W = U S Vh``, later ``S = P S' Qh``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer

from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank.base import whole_shape
from hpc_oialr.lowrank.layout import REPLICATED, Replicated
from hpc_oialr.optim.stack import OptimizerStack, tensors_in
from hpc_oialr.optim.state_kinds import FACTORED, INSTEAD, Kind

NEVER_ZEROED = ("weight", "step size")


def check_state(stack: OptimizerStack, parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Raise :class:`ModelError` unless every tensor in the state of these named weights and cores has a known meaning.

    To be called for all layers before the first of them is changed.
    """
    for node, state in stack.states():
        if isinstance(node, LBFGS):
            continue
        for name, parameter in parameters:
            shape = whole_shape(parameter)
            found = state.get(parameter, {})
            factored = {key for pair in _factored(found, shape) for key in pair}
            for key, value in found.items():
                if key not in factored:
                    _check_value(stack, node, key, value, name, shape)


def _check_value(stack: OptimizerStack, node: Any, key: str, value: Any, name: str, shape: torch.Size) -> None:
    where = f"{type(node).__name__}'s state {key!r} of {name}"
    if not isinstance(value, Tensor):
        if any(tensor.numel() > 1 for tensor in tensors_in(value, objects=True)):
            raise ModelError(
                f"{where} is a {type(value).__name__} of tensors, which cannot follow the weight through W = U S Vh. "
                f"{INSTEAD}."
            )
        return
    if value.dim() == 0 or (value.numel() == 1 and value.shape != shape):
        return
    if value.shape != shape and value.dim() == 2 and len({*value.shape}) == 1 and len(value) <= min(shape):
        raise ModelError(
            f"{where} has shape {tuple(value.shape)}, as of a core with r = {len(value)}, but the weight is "
            f"{tuple(shape)}: the optimizer's state is of another structure than the model. Call "
            "hpc_oialr.match_structure(model, state_dict) and model.load_state_dict(state_dict) with the model's state "
            "of the same checkpoint, then make the optimizer and load its state."
        )
    # A subclass from elsewhere stores something else than its values.
    ordinary = type(value).__module__.startswith("torch.") or type(value) is Tensor
    if value.shape != shape or not (ordinary and value.is_floating_point()):
        of_shape = value.shape == shape
        what = "quantised or not of real numbers" if of_shape else "factored, sketched or quantised"
        raise ModelError(
            f"{where} has shape {tuple(value.shape)} and dtype {value.dtype} where the weight has {tuple(shape)}: state "
            f"that is {what} cannot follow the weight through W = U S Vh. {INSTEAD}."
        )
    if stack.kind(node, key) is None:
        # Where wrappers write into the state of what they wrap, the outermost has probably written it.
        outer = next((other for other in stack.nodes if getattr(other, "state", None) is node.state), node)
        optimizer = type(outer).__name__
        raise ModelError(
            f"{optimizer}'s state {key!r} of {name} has the weight's shape and an unknown meaning, so that it cannot "
            f"follow W = U S Vh. Say what it is before OIALR(...): hpc_oialr.register_optimizer_state({optimizer}, "
            f'{{"{key}": "gradient"}}), with "gradient" for what is linear in the gradient, "square" for squares of '
            'gradients, "magnitude" for their absolute values, "weight" for a copy or average of the weight, "reset" '
            "for what may be set to zero."
        )


def _factored(state: dict[str, Any], shape: torch.Size) -> list[tuple[str, str]]:
    """Keys of means over rows and over columns of one matrix of second moments, with an axis of 1 or without."""
    return [
        (rows, columns)
        for rows, columns in FACTORED.items()
        if rows in state
        and columns in state
        and tuple(state[rows].shape) in (tuple(shape[:-1]), (*shape[:-1], 1))
        and tuple(state[columns].reshape(-1).shape) == (shape.numel() // shape[-2],)
        and not isinstance(state[rows], DTensor)
    ]


def transform_state(
    optimizer: OptimizerStack | Optimizer,
    parameter: nn.Parameter,
    left: Tensor | None,
    right: Tensor | None,
    *,
    layout: Replicated = REPLICATED,
    core: bool = False,
    reset: bool = False,
    new: int = 0,
) -> None:
    """Transform the state of a weight or a core to the basis of ``left`` and ``right``, in place; in exact arithmetic.

    Each tensor is transformed as its :data:`hpc_oialr.optim.state_kinds.Kind` says; step counters and other scalars
    stay. L-BFGS loses its history, whose curvature belongs to the old variables. State that :func:`check_state` refuses
    raises :class:`ModelError` before anything is changed.

    ``left`` and ``right`` are m x r and r x n: ``U`` (this rank's rows) and ``Vh`` at the conversion, ``P[:, :r']`` and
    ``Qh[:r']`` at an update, where ``parameter`` is a ``core``; None, for one side of a trained basis, leaves that
    side as it is. ``reset`` zeroes the moments instead, as the published
    code does; copies of the weight are still transformed. The last ``new`` columns of ``left`` and rows of ``right`` are
    zero: directions that a core did not have. There what is linear in gradients is zero, and squares are the mean of the
    others: from zero an optimizer without a correction of bias would take steps many times as long.
    """
    stack = optimizer if isinstance(optimizer, OptimizerStack) else OptimizerStack(optimizer)
    check_state(stack, [("a parameter", parameter)])
    move = _Move(left, right, layout, core, reset, new)
    changed: list[tuple[dict[str, Any], str, Tensor]] = []
    for node, states in stack.states():
        if isinstance(node, LBFGS):
            states.clear()
            continue
        state = states.get(parameter, {})
        moved = {
            key: move(stack.kind(node, key), value, state)
            for key, value in state.items()
            if isinstance(value, Tensor) and value.dim() >= 2 and value.shape == parameter.shape
        }
        if {"grad_sum_sq", "s", "x0"} <= moved.keys():
            eps = stack.home(parameter)[1]["eps"]
            moved["x0"] = move.anchor(state, moved, eps)
        for rows, columns in _factored(state, parameter.shape):
            moved |= move.factored(state, rows, columns, parameter.dim())
        changed += [(state, key, value.to(state[key].dtype)) for key, value in moved.items()]
    # Written at the end: after ZeroRedundancyOptimizer.load_state_dict two states hold one tensor.
    for state, key, value in changed:
        value = layout.put_core(value.contiguous())
        if core and type(value) is type(state[key]) and value.shape == state[key].shape:
            state[key].copy_(value)  # a captured CUDA graph reads it where it is
        else:
            state[key] = value


def project(value: Tensor, left: Tensor | None, right: Tensor | None, layout: Replicated, *, core: bool) -> Tensor:
    """``left^T value right^T``; without a side only whole matrices."""
    if left is not None and right is not None:
        return layout.project_core(value, left, right) if core else layout.project(value, left, right)
    value = value if left is None else left.mT @ value.to(left.dtype)
    return value if right is None else value.to(right.dtype) @ right.mT


class _Move:
    """How one tensor of the weight's shape moves."""

    def __init__(
        self, left: Tensor | None, right: Tensor | None, layout: Replicated, core: bool, reset: bool, new: int
    ) -> None:
        self.left, self.right, self.reset, self.new = left, right, reset, new
        self.project = partial(project, layout=layout, core=core)

    def __call__(self, kind: Kind | None, value: Tensor, state: dict[str, Any]) -> Tensor:
        if kind == "reset" or (self.reset and kind not in NEVER_ZEROED):
            sides = [side for side in (self.left, self.right) if side is not None]
            rows, columns = whole_shape(value)[0], whole_shape(value)[1:].numel()
            if self.right is not None:  # for each place of a kernel in Tucker form
                columns = self.right.shape[0] * (columns // self.right.shape[1])
            return sides[0].new_zeros(rows if self.left is None else self.left.shape[1], columns)
        if kind in ("gradient", "weight"):
            return self.project(value, self.left, self.right)
        if kind in ("magnitude", "step size"):
            return self._square(value.square()).sqrt()
        if kind == "centred" and "grad_avg" in state:
            mean = state["grad_avg"]
            variance = (value - mean.square()).clamp(min=0)
            return self._square(variance) + self.project(mean, self.left, self.right).square()
        return self._square(value)

    def _square(self, value: Tensor) -> Tensor:
        left, right = (None if side is None else side * side for side in (self.left, self.right))
        moved = self.project(value, left, right)
        if self.new:
            mean = moved[: -self.new, : -self.new].mean()
            moved[-self.new :], moved[:, -self.new :] = mean, mean
        return moved

    def factored(self, state: dict[str, Any], rows: str, columns: str, axes: int) -> dict[str, Tensor]:
        """Means over rows and columns of ``rows x columns / mean(rows)`` in the new basis."""
        R, C = state[rows], state[columns]
        axis = R.dim() == axes
        if not axis:
            R, C = R.unsqueeze(-1), C.unsqueeze(-2)
        mean = R.mean(dim=-2, keepdim=True)
        V = self("square", (R * C) / torch.where(mean == 0, 1.0, mean), state)
        R, C = V.mean(-1, keepdim=axis), V.mean(-2, keepdim=axis)
        return {rows: R, columns: C}

    def anchor(self, before: dict[str, Any], moved: dict[str, Tensor], eps: float) -> Tensor:
        """MADGRAD's ``x0``, so that ``z = x0 - s / (cbrt(grad_sum_sq) + eps)`` moves as the weight does."""
        z = before["x0"] - before["s"] / (before["grad_sum_sq"].pow(1 / 3) + eps)
        step = moved["s"] / (moved["grad_sum_sq"].pow(1 / 3) + eps)
        return self.project(z, self.left, self.right) + step.nan_to_num(0.0)


def transform_average(value: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A running average of the weight (m x n, or the core r x r) in the new basis: ``left^T value right^T``."""
    return REPLICATED.project(value, left, right).to(value.dtype)
