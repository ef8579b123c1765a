"""A core's own step size equals a learning rate of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from hpc_oialr import MuonAdamW
from hpc_oialr.optim.core_lr import CoreLearningRate, adam_scale, core_factor
from hpc_oialr.optim.muon import CORE_LR_RATIO
from hpc_oialr.optim.stack import OptimizerStack

OPTIMIZERS: dict[str, Callable[[list[dict[str, object]]], torch.optim.Optimizer]] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, weight_decay=0.1),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, weight_decay=0.1, fused=True),
    "Adam amsgrad foreach": lambda groups: torch.optim.Adam(groups, amsgrad=True, foreach=True),
    "SGD momentum": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "Muon": lambda groups: torch.optim.Muon(groups),
    "MuonAdamW": lambda groups: MuonAdamW(groups),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_factor_equals_a_larger_learning_rate(name: str) -> None:
    torch.manual_seed(0)
    start = [torch.randn(4, 4, dtype=torch.float64) for _ in range(2)]
    (a, b), (c, d) = ([nn.Parameter(x.clone()) for x in start] for _ in range(2))
    scaled = OPTIMIZERS[name]([{"params": [a, b], "lr": 0.01}])
    CoreLearningRate([scaled]).set(a, 3.0)
    plain = OPTIMIZERS[name]([{"params": [c], "lr": 0.03}, {"params": [d], "lr": 0.01}])
    for _ in range(4):
        for p, q in ((a, c), (b, d)):
            p.grad = torch.randn(4, 4, dtype=torch.float64)
            q.grad = p.grad.clone()
        scaled.step()
        plain.step()
    torch.testing.assert_close(a, c, rtol=0, atol=1e-12)
    torch.testing.assert_close(b, d, rtol=0, atol=1e-12)


def test_automatic_factors() -> None:
    core = nn.Parameter(torch.zeros(64, 64))

    def factor(optimizer: torch.optim.Optimizer, m: int, n: int, scale: float | str) -> float:
        return core_factor(OptimizerStack(optimizer), core, m, n, scale)

    assert factor(torch.optim.SGD([core]), 768, 256, "auto") == 1.0
    assert factor(torch.optim.AdamW([core]), 768, 256, "auto") == adam_scale(768, 256, 64)
    assert factor(torch.optim.AdamW([core]), 768, 256, 2.5) == 2.5
    muon = pytest.approx(3**0.5)
    assert factor(torch.optim.Muon([core]), 768, 256, 1.0) == muon
    assert factor(MuonAdamW([core]), 768, 256, "auto") / CORE_LR_RATIO == muon
    assert factor(MuonAdamW([{"params": [core], "cores": True}]), 768, 256, "auto") == muon
    assert factor(MuonAdamW([core]), 256, 768, 1.0) == 1.0
    matched = torch.optim.Muon([core], adjust_lr_fn="match_rms_adamw")
    assert factor(matched, 768, 256, 1.0) == pytest.approx(12**0.5)
