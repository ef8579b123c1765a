"""NestedLoRA's loss: leading singular functions of an operator T, in order, by low-rank approximation.

With functions ``f_l`` and ``g_l``, l = 1 ... L, and Gram matrices ``F_ij = <f_i, f_j>``, ``G_ij = <g_i, g_j>``,

    loss = -2 sum_l m_l <f_l, T g_l> + sum_ij M_ij F_ij G_ij.

For ``m = M = 1`` that is ``||T - sum_l f_l (x) g_l||^2 - ||T||^2``: the span is the leading one, but not the single
functions. Nesting orders them. "joint" is the mean of these losses for the first 1, 2, ... L functions:
``m_l = (L - l + 1) / L``, ``M_ij = m_max(i,j)``. "sequential" has ``m = M = 1`` too, but each function is led only by
those before it, as if these were fixed. At the minimum ``f_l = sqrt(s_l) u_l``, ``g_l = sqrt(s_l) v_l``. Gradients are

    d loss / d f_l = 2 [ -m_l T g_l + sum_i M_il G_il f_i ],    M_il = 0 for i > l in sequential nesting,

and the same for g with ``T* f`` and F. For eigenfunctions of a self-adjoint operator g is f, and gradients are doubled.

J. J. Ryu, X. Xu, H. S. M. Erol, Y. Bu, L. Zheng and G. W. Wornell, Operator SVD with Neural Networks via Nested Low-Rank
Approximation, ICML 2024, arXiv 2402.03655.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from hpc_oialr.errors import UnknownNameError
from hpc_oialr.linalg.communicator import Communicator, Group, communicator

Nesting = Literal["joint", "sequential", "none"]
# Of the largest norm; without it functions that are still almost zero would move the network by noise.
BALANCE_FLOOR = 0.01


class Side(NamedTuple):
    """This rank's B points of a minibatch, on one of the operator's two spaces.

    Points are drawn on all ranks together; over all of them ``sum_b weight_b h(x_b)`` estimates the integral of h.
    """

    values: Tensor  # f_l(x_b), B x L, with their graph
    image: Tensor  # (T g_l)(x_b), B x L: the operator, applied to the functions of the other side
    weight: Tensor  # B


class Estimates(NamedTuple):
    """Inner products over the points of all ranks."""

    overlap: Tensor  # <f_l, T g_l>, L
    grams: tuple[Tensor, ...]  # <f_i, f_j>, and <g_i, g_j> if there are two sides; L x L

    @property
    def values(self) -> Tensor:
        """``<f_l, T g_l> / (||f_l|| ||g_l||)``: singular values, or Rayleigh quotients; L."""
        norms = [gram.diagonal().clamp_min(1e-30).sqrt() for gram in (self.grams[0], self.grams[-1])]
        return self.overlap / (norms[0] * norms[1])


def masks(L: int, nesting: Nesting) -> tuple[Tensor, Tensor]:
    """The weights ``m`` (L) and ``M`` (L x L) of the gradients.

    Examples
    --------
    >>> masks(2, "joint")
    (tensor([1.0000, 0.5000]), tensor([[1.0000, 0.5000],
            [0.5000, 0.5000]]))
    """
    if nesting not in get_args(Nesting):
        raise UnknownNameError("nesting", nesting, get_args(Nesting))
    m, M = torch.ones(L), torch.ones(L, L)
    if nesting == "joint":
        m = torch.arange(L, 0, -1) / L
        M = torch.minimum(m[:, None], m)
    return m, M.triu() if nesting == "sequential" else M


@torch.no_grad()
def estimates(sides: Sequence[Side], group: Group = None) -> Estimates:
    """Inner products of one or two sides; one all-reduce of ``2 L (L + 1)`` numbers at most."""
    L = sides[0].values.shape[1]
    parts = []
    for side in sides:
        weighted = side.weight[:, None] * side.values
        parts += [weighted.mT @ side.values, (weighted * side.image).sum(0, keepdim=True)]
    total = communicator(group).all_reduce(torch.cat(parts)).split([L, 1] * len(sides))
    return Estimates(total[1][0], total[::2])


def nested_lora(
    sides: Sequence[Side], *, nesting: Nesting = "joint", balance: bool = False, group: Group = None
) -> Tensor:
    """The loss over the points of all ranks, with NestedLoRA's gradients.

    Images carry no gradient: the operator is never differentiated by the networks' weights.

    Parameters
    ----------
    sides
        Two for singular functions, f and g; one for eigenfunctions, whose ``image`` is then T f.
    nesting
        "joint", "sequential", or "none" for comparison.
    balance
        Divide the gradients of f_l and g_l by ``||f_l|| ||g_l||``, plus a hundredth of the largest such product. The
        gradients vanish at the same functions. Otherwise those of small values, whose gradients are as their values to
        the power 3/2, hardly shape a network that all functions share.
    group
        See :func:`~hpc_oialr.linalg.communicator.communicator`. Every rank gets the value for all points, and
        after ``backward()`` its own points' part of the parameters' gradient: add these up over ranks.

    Cost: ``4 B L^2`` multiply-adds a side, and the all-reduce of :func:`estimates`.
    """
    with torch.no_grad():
        found = estimates(sides, group)
        m, M = (mask.to(sides[0].values) for mask in masks(len(found.overlap), nesting))
        value = -2 * m @ found.overlap + (torch.maximum(M, M.mT) * found.grams[0] * found.grams[-1]).sum()
        # <f, T f> and each product of norms are of second and fourth order in f.
        factor = torch.tensor(2.0 if len(sides) == 2 else 4.0).to(m)
        if balance:
            norms = (found.grams[0].diagonal() * found.grams[-1].diagonal()).sqrt()
            factor = factor / (norms + BALANCE_FLOOR * norms.max())
        gradients = [
            factor * side.weight[:, None] * (side.values @ (M * gram) - m * side.image)
            for side, gram in zip(sides, reversed(found.grams), strict=True)
        ]
    # A function whose gradient is the one above; it is 0 itself.
    led = torch.stack([(gradient * side.values).sum() for gradient, side in zip(gradients, sides, strict=True)]).sum()
    return value + (led - led.detach())


def sum_gradients(parameters: Sequence[torch.nn.Parameter], comm: Communicator) -> None:
    """Add up gradients over ranks, in one message of all of them; no rank may lack one."""
    if comm.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = comm.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
