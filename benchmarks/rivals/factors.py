"""Layers of two trained factors ``W = up down``, and Muon on both of them as Spectron steps them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_oialr.linalg.newton_schulz import newton_schulz_each
from hpc_oialr.lowrank import Selection, select
from hpc_oialr.lowrank.folded import FoldedLinear, FoldedWeight, empty_folded, folded_layers
from hpc_oialr.optim import MuonAdamW
from hpc_oialr.optim.muon import Group


class SiluLinear(FoldedLinear):
    """``up silu(down x)``, the bottleneck of CoLA (arXiv 2502.10940)."""

    def forward(self, x: Tensor) -> Tensor:
        """Input (..., in), output (..., out)."""
        return F.linear(F.silu(F.linear(x, self.down)), self.up, self.bias)


def become_factors(
    model: nn.Module, selection: Selection, r_of: Callable[[int], int], *, silu: bool = False
) -> list[FoldedWeight]:
    """Cut the selected weights, in place, to two trained factors by their SVD; returns the layers.

    ``W = U s Vh``, cut to r: ``up = U sqrt(s)`` and ``down = sqrt(s) Vh``. Convolutions become one of r filters and
    one of extent 1.

    Parameters
    ----------
    r_of
        r of a weight with ``k = min(m, n)``; where two factors would not be smaller the weight is cut, but kept whole.
    silu
        SiLU between the factors of linear layers; ``up`` is doubled, since silu(z) = z / 2 + O(z^2).
    """
    cut: dict[str, tuple[Tensor, Tensor]] = {}
    for target in select(model, selection):
        weight = target.weight.detach()
        matrix = weight.mT if target.kind == "Conv1D" else weight.flatten(1)
        r, (m, n) = r_of(target.k), matrix.shape
        if r * (m + n) < m * n:
            U, s, Vh = torch.linalg.svd(matrix.float(), full_matrices=False)
            root = s[:r].sqrt()
            cut[target.name] = root[:, None] * Vh[:r], U[:, :r] * root
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    empty_folded(model, {name: len(down) for name, (down, _) in cut.items()})
    layers = folded_layers(model)
    with torch.no_grad():
        for name, (down, up) in cut.items():
            layer = layers[name]
            linear = isinstance(layer, FoldedLinear)
            if silu and linear:
                layer.__class__ = SiluLinear
            layer.down.copy_(down.view_as(layer.down))
            layer.up.copy_((2 * up if silu and linear else up).view_as(layer.up))
    factors = {id(p) for layer in layers.values() for p in (layer.down, layer.up)}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained or id(p) in factors)
    model.train()
    return list(layers.values())


class Spectron(MuonAdamW):
    """Muon on both factors, the step such that the product changes as a dense weight would under Muon.

    After arXiv 2602.12429, of which no code was found; what is done here, exactly: with ``O_up`` and ``O_down`` the
    Newton-Schulz directions of both momenta (spectral norm about 1) and the factors' spectral norms by two steps of
    power iteration at each step, from where the last ones ended,

        rho = eta sqrt(max(1, m / n)) / (|up| + |down| + 1)
        up <- (1 - eta wd / 2) up - rho O_up,   down <- (1 - eta wd / 2) down - rho O_down.

    The product then changes by at most ``rho (|up| + |down| + rho) <= eta sqrt(max(1, m / n))`` in the spectral norm for
    rho <= 1, which is what Muon changes a dense weight by at the same rate eta; so does the decay.

    A group with ``"pairs": True`` holds up, down, up, down, ...; others are those of :class:`MuonAdamW`.
    """

    def _muon(self, params: list[Tensor], group: Group) -> None:
        if not group.get("pairs"):
            super()._muon(params, group)
            return
        done = newton_schulz_each(self._momentum(params, group), steps=group["newton_schulz_steps"])
        norms = [self._spectral_norm(p) for p in params]
        lr = group["lr"]
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"] / 2)
        for i in range(0, len(params), 2):
            up, down = params[i], params[i + 1]
            m, n = up.shape[0], down.numel() // down.shape[0]
            rho = lr * max(1.0, m / n) ** 0.5 / (norms[i] + norms[i + 1] + 1)
            up.sub_(done[i] * rho)
            down.sub_(done[i + 1] * rho)

    def _spectral_norm(self, p: Tensor) -> Tensor:
        """An estimate from below."""
        matrix, state = p.flatten(1), self.state[p]
        if "right" not in state:
            state["right"] = F.normalize(matrix.sum(0), dim=0)
        right = state["right"]
        for _ in range(2):
            left = matrix @ right
            right = F.normalize(matrix.mT @ left, dim=0)
        state["right"].copy_(right)
        return torch.linalg.vector_norm(matrix @ right)


def spectron(
    model: nn.Module, layers: Sequence[FoldedWeight], *, lr: float, adamw_lr: float, weight_decay: float
) -> Spectron:
    """Spectron for the factors of ``layers``, AdamW for the rest."""
    pairs: list[nn.Parameter] = [p for layer in layers for p in (layer.up, layer.down)]
    taken = {id(p) for p in pairs}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups: list[Group] = [
        {"params": pairs, "algorithm": "muon", "pairs": True, "lr": lr},
        {"params": [p for p in rest if p.dim() > 1], "algorithm": "adamw", "lr": adamw_lr},
        {"params": [p for p in rest if p.dim() <= 1], "algorithm": "adamw", "lr": adamw_lr, "weight_decay": 0.0},
    ]
    return Spectron(groups, weight_decay=weight_decay)
