"""Models in training with all that a user would save of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits, muon_adamw


class Attention(nn.Module):
    """Packed and separate projections, a convolution and linear layers."""

    def __init__(self, kdim: int | None) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.inner = nn.Sequential(nn.Linear(12, 8), nn.Tanh())
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=kdim, vdim=kdim)
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.inner(self.conv(x.mT).mT)
        other = y if self.attention._parameters.get("in_proj_weight") is not None else None
        if self.attention.kdim != 8:
            other = y[..., : self.attention.kdim]
        keys = y if other is None else other
        return self.last(self.attention(y, keys, keys)[0].mean(1))


def attention() -> nn.Module:
    return Attention(None)


def separate() -> nn.Module:
    return Attention(6)


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 5))


X, Y = torch.randn(16, 4, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 5
OPTIMIZERS = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), 1e-2, amsgrad=True),
    "MuonAdamW": lambda model: muon_adamw(model, lr=0.02),
}


class Run:
    """A model in training, with all that a user would save."""

    def __init__(self, make: Any, optimizer: str, model: nn.Module | None = None) -> None:
        torch.manual_seed(0)
        self.model = make() if model is None else model
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        limits = RankLimits(max_drop=0.3, round_to=1)
        config = OIALRConfig(delay=3, frequency=2, rule=FixedFraction(0.3), layer_share_step=1.0, limits=limits)
        self.oialr = OIALR(self.model, self.optimizer, config)

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            F.cross_entropy(self.oialr.model(X), Y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.oialr.step()
        return self

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "oialr": self.oialr}
        state = {name: part.state_dict() for name, part in parts.items()}
        return copy.deepcopy(state | {"tensors": self.oialr.tensor_state()})

    def load(self, state: dict[str, Any], order: tuple[str, ...], strict: bool = True) -> Run:
        for name in order:
            if name == "model":
                self.model.load_state_dict(state["model"], strict=strict)
            elif name == "oialr":
                self.oialr.load_state_dict(copy.deepcopy(state["oialr"]), state["tensors"])
            else:
                self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        return self

    def output(self) -> torch.Tensor:
        return self.model(X).detach()


def groups(run: Run) -> list[list[str]]:
    names = {p: name for name, p in run.model.named_parameters()}
    return [[names[p] for p in group["params"]] for group in run.optimizer.param_groups]


def in_step(run: Run) -> None:
    """What the optimizer holds is what is trained, and all of it is of the right shape."""
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} >= {id(p) for p in run.model.parameters() if p.requires_grad}
    assert set(map(id, run.optimizer.state)) <= set(map(id, held))
    for p, state in run.optimizer.state.items():
        assert all(t.shape in (p.shape, ()) for t in state.values() if isinstance(t, torch.Tensor))
