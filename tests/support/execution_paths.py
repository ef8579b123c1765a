"""One training run by every way to compute a low-rank layer; TRITON_INTERPRET=1 lets the fused kernel run on a CPU."""

from __future__ import annotations

from unittest import mock

import torch
from support.gpu_loop import one_step
from torch import Tensor, nn

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits, Selection, muon_adamw
from hpc_oialr.lowrank.products import FUSED, ONEDNN, TORCH, Kernels

# The kernels, the crossover from factored to merged products, and the devices on which inputs are shared.
PATHS: dict[str, tuple[tuple[Kernels, ...], float, tuple[str, ...]]] = {
    "three products": ((), 2.0, ()),
    "folded": ((TORCH,), 2.0, ()),
    "oneDNN": ((ONEDNN,), 2.0, ()),
    "fused": ((FUSED._replace(serve=TORCH.serve),), 2.0, ()),
    "shared input": ((TORCH,), 2.0, ("cpu",)),
    "merged": ((TORCH,), 0.0, ()),
}


class Block(nn.Module):
    """Query, key and value of one input, and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.head(x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))).mean(1)


def losses_and_r(kernels: tuple[Kernels, ...], crossover: float, devices: tuple[str, ...]) -> dict[str, list[object]]:
    """Twelve steps: conversion after the third, cuts after the sixth and ninth."""
    torch.manual_seed(0)
    model = Block()
    config = OIALRConfig(
        delay=3, frequency=3, layer_share_step=1.0, crossover=crossover, selection=Selection(keep_last=True),
        rule=FixedFraction(0.25), limits=RankLimits(max_drop=0.5, round_to=8, at_conversion=0.75),
    )  # fmt: skip
    oialr = OIALR(model, muon_adamw(model, lr=0.1), config)
    x, labels = torch.randn(16, 8, 32), torch.randint(4, (16,))
    found: dict[str, list[object]] = {"losses": [], "r": []}
    with (
        mock.patch("hpc_oialr.lowrank.products.KERNELS", kernels),
        mock.patch("hpc_oialr.lowrank.shared_input.DEVICES", devices),
    ):
        for _ in range(12):
            found["losses"].append(one_step(oialr, x, labels)[0].item())
            found["r"].append(oialr.r)
    return found
