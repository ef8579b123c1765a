"""Algorithm 1 of arXiv 2401.08505 in plain torch: one process, linear layers, slow and obvious.

:class:`hpc_oialr.OIALR` does the same fast, on many ranks, for more layers and optimizers; tests compare it with this.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.rules import Spectrum


class ReferenceLinear(nn.Module):
    """``y = x (U S Vh)^T + bias``; ``S`` and ``bias`` are trained, ``U`` and ``Vh`` are not.

    ``U`` is m x r with orthonormal columns, ``S`` r x r, ``Vh`` r x n with orthonormal rows, ``bias`` the dense layer's.
    """

    def __init__(self, U: Tensor, S: Tensor, Vh: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.U, self.Vh, self.S, self.bias = U, Vh, nn.Parameter(S), bias

    def forward(self, x: Tensor) -> Tensor:
        """``x`` of shape (..., n) gives (..., m)."""
        return nn.functional.linear(x, self.U @ self.S @ self.Vh, self.bias)


class ReferenceOIALR:
    """Call :meth:`step` after every ``optimizer.step()``.

    Parameters
    ----------
    model, optimizer
        A model, and an optimizer of torch made from its parameters.
    layers
        Names of the linear layers that become low-rank, in the model's order.
    config
        Of its settings: ``delay`` d, ``frequency`` nu, ``rule``, ``limits``, ``layer_share_step``, ``carry_moments``.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, layers: list[str], config: OIALRConfig) -> None:
        config.require_steps()
        self.model, self.optimizer, self.layers, self.config = model, optimizer, layers, config
        self.t = self.updates = 0

    @torch.no_grad()
    def step(self) -> None:
        """Convert at step d; every nu steps from then on, update the last layers, a larger share each time."""
        self.t += 1
        since = self.t - self.config.delay
        if since == 0:
            for name in self.layers:
                self._convert(name)
        elif since > 0 and since % self.config.frequency == 0:
            self.updates += 1
            share = min(1.0, self.config.layer_share_step * self.updates)
            due = self.layers[-max(1, round(share * len(self.layers))) :]
            for name, r in zip(due, self._choose(due), strict=True):
                self._update(name, r)

    def _convert(self, name: str) -> None:
        """``W = U diag(s) Vh``: freeze ``U`` and ``Vh``, train ``S = diag(s)``."""
        dense = self.model.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        U, s, Vh = torch.linalg.svd(dense.weight, full_matrices=False)
        r = self.config.limits.initial(len(s))
        U, s, Vh = U[:, :r], s[:r], Vh[:r]
        layer = ReferenceLinear(U, torch.diag(s), Vh, dense.bias)
        self.model.set_submodule(name, layer)
        self._replace(dense.weight, layer.S, U.mT, Vh.mT, reset=not self.config.carry_moments)

    def _choose(self, names: list[str]) -> list[int]:
        """The new r of each layer; most rules look at one layer after another."""
        spectra = []
        for layer in map(self.model.get_submodule, names):
            assert isinstance(layer, ReferenceLinear)
            spectra.append(Spectrum(torch.linalg.svdvals(layer.S), layer.U.shape[0], layer.Vh.shape[1]))
        limits = self.config.limits
        wanted = self.config.rule.choose_all(spectra, limits)
        return [limits.apply(r, len(each.s), min(each.m, each.n)) for r, each in zip(wanted, spectra, strict=True)]

    def _update(self, name: str, r: int) -> None:
        """``S = P diag(s) Qh``: ``U <- U P``, ``Vh <- Qh Vh``, ``S <- diag(s)``; small values are dropped."""
        layer = self.model.get_submodule(name)
        assert isinstance(layer, ReferenceLinear)
        old = layer.S
        P, s, Qh = torch.linalg.svd(old)
        P, s, Qh = P[:, :r], s[:r], Qh[:r]
        layer.U, layer.S, layer.Vh = layer.U @ P, nn.Parameter(torch.diag(s)), Qh @ layer.Vh
        self._replace(old, layer.S, P.mT, Qh.mT, reset=r < len(old) and not self.config.carry_moments)

    def _replace(self, old: Tensor, new: nn.Parameter, left: Tensor, right: Tensor, *, reset: bool) -> None:
        """Replace ``old`` by ``new`` in the optimizer and transform its state, as ``new = left old right``.

        Averages of gradients are transformed exactly, averages of squares as if entries were uncorrelated; ``reset``
        zeroes both, as published.
        """
        for group in self.optimizer.param_groups:
            group["params"] = [new if p is old else p for p in group["params"]]
        state = self.optimizer.state.pop(old, {})
        for key in state.keys() & {"momentum_buffer", "exp_avg"}:
            state[key] = left @ state[key] @ right
        for key in state.keys() & {"exp_avg_sq"}:
            state[key] = left.square() @ state[key] @ right.square()
        for key in state.keys() & {"momentum_buffer", "exp_avg", "exp_avg_sq"} if reset else ():
            state[key] = torch.zeros_like(new)
        if state:
            self.optimizer.state[new] = state
