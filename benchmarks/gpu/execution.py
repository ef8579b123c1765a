"""Ways to run a training step. One that comes to exist is one line in :data:`MODES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gpu.models import Batch
from benchmarks.gpu.timing import captured
from hpc_oialr import OIALR, Selection, muon_adamw
from hpc_oialr.train.compilation import compile_model

Step = Callable[[], object]


@dataclass(frozen=True)
class Trainee:
    """A model with its optimizer and one batch; what a mode turns into a step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch: Batch
    device: torch.device
    controller: OIALR | None = None

    def gradients(self) -> Tensor:
        """Forward under bf16 autocast, and backward."""
        with torch.autocast(self.device.type, torch.bfloat16):
            loss: Tensor = self.model(**self.batch).loss
        loss.backward()
        return loss.detach()

    def step(self) -> Tensor:
        """Forward, backward, optimizer."""
        loss = self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def make_optimizer(
    name: str, model: nn.Module, selection: Selection, *, capturable: bool = False
) -> torch.optim.Optimizer:
    """ "AdamW" (torch's, fused) or "Muon" (this project's MuonAdamW), of a dense model."""
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=capturable)
    return muon_adamw(model, lr=1e-3, adamw_lr=1e-4, selection=selection)


def eager(trainee: Trainee) -> tuple[Step, str]:
    """As a plain training loop runs it."""
    return trainee.step, "eager"


def compiled_blocks(trainee: Trainee) -> tuple[Step, str]:
    """torch.compile of every transformer block by itself: one compilation serves all of them."""
    # Without a GPU only the capture is tested: generating code for the CPU takes half a minute.
    backend = "inductor" if trainee.device.type == "cuda" else "eager"
    compile_model(trainee.model, "blocks", backend=backend)
    return trainee.step, "compiled blocks"


def cuda_graph(trainee: Trainee) -> tuple[Step, str]:
    """The whole step captured once and replayed, or eager with the reason why it cannot be captured."""
    return captured(trainee.step, trainee.device)


# Compiling the whole model at once is left out: it was slower than eager on an H200, dense and low-rank.
MODES: dict[str, Callable[[Trainee], tuple[Step, str]]] = {
    "eager": eager,
    "cuda graph": cuda_graph,
    "compiled blocks": compiled_blocks,
}
