"""A workload whose bytes can be counted by hand: two square layers without biases and a function between them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from hpc_oialr.engines import DDP
from hpc_oialr.plan.workload import Workload
from hpc_oialr.train.config import RunConfig, TrainConfig
from hpc_oialr.train.optimizers import AdamW

MIB = 1 << 20


def two_layers(width: int, batch: int) -> Workload:
    """``sum(W2 relu(W1 x))`` under AdamW."""

    def build(_: object) -> nn.Module:
        first, second = (nn.Linear(width, width, bias=False) for _ in range(2))
        return nn.Sequential(first, nn.ReLU(), second)

    model: Any = SimpleNamespace(build=build, pairs=(), float64=True)
    task: Any = SimpleNamespace(
        loss=lambda module, batch, _: module(batch["x"]).sum(), count=lambda batch: 1, check=lambda *_: None
    )
    config = RunConfig(
        data=SimpleNamespace(),  # type: ignore[arg-type]
        model=model,
        task=task,
        optimizer=AdamW(lr=0.1, fused=True),
        train=TrainConfig(steps=1, global_batch=batch),
        engine=DDP(),
    )
    return Workload(config, {"x": torch.zeros(width)}, samples=10 * batch)
