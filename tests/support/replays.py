"""CUDA graphs on the CPU: what is recorded is called again, so that all around the graph runs as on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hpc_oialr.train import cuda_graph, run, trainer


def record(call: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """As ``cuda_graph.capture``: computes nothing yet; a replay reads the same inputs and fills the same result."""
    result = torch.zeros(())

    def replay() -> None:
        result.copy_(call())

    return replay, result


def allow_on_cpu(monkeypatch: pytest.MonkeyPatch, capture: Callable[..., object] = record) -> None:
    """Let runs on the CPU capture their steps by ``capture``."""
    monkeypatch.setattr(cuda_graph, "capture", capture)
    for module in (run, trainer):
        monkeypatch.setattr(
            module,
            "refusal",
            lambda context: "as set" if context.config.train.cuda_graph == "off" else "",
        )
