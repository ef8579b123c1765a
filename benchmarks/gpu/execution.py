"""Ways to run a training step. One that comes to exist is one line in :data:`MODES`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.gpu.models import Batch, own_loss
from benchmarks.gpu.timing import captured
from hpc_oialr import OIALR, Selection, muon_adamw
from hpc_oialr.train.bf16_params import cast_parameters
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
    bf16_params: bool = False  # bf16 casts of the parameters instead of autocast
    loss: Callable[[nn.Module, Batch], Tensor] = own_loss

    def gradients(self) -> Tensor:
        """Forward in bf16, and backward."""
        batch = self.batch
        if self.bf16_params:
            batch = {name: x.bfloat16() if x.is_floating_point() else x for name, x in batch.items()}
        with cast_parameters(self.model, torch.bfloat16) if self.bf16_params else nullcontext():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=not self.bf16_params):
                loss = self.loss(self.model, batch)
            loss.backward()
        return loss.detach()

    def step(self) -> Tensor:
        """Forward, backward, optimizer."""
        loss = self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


Mode = Callable[[Trainee], tuple[Step, str]]


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
    name = "bf16 params, compiled blocks" if trainee.bf16_params else "compiled blocks"
    return trainee.step, name


def cuda_graph(trainee: Trainee) -> tuple[Step, str]:
    """The whole step captured once and replayed, or eager with the reason why it cannot be captured."""
    return captured(trainee.step, trainee.device)


def compiled_blocks_in_a_graph(trainee: Trainee) -> tuple[Step, str]:
    """Both."""
    compiled_blocks(trainee)
    step, method = cuda_graph(trainee)
    return step, f"compiled blocks, {method}"


def bf16_params(mode: Mode) -> Mode:
    """``mode`` with ``train.precision: bf16-params`` instead of autocast."""

    def run(trainee: Trainee) -> tuple[Step, str]:
        step, method = mode(replace(trainee, bf16_params=True))
        return step, "bf16 params" if mode is eager else method

    return run


# Compiling the whole model at once is left out: it was slower than eager on an H200, dense and low-rank.
MODES: dict[str, Mode] = {
    "eager": eager,
    "cuda graph": cuda_graph,
    "compiled blocks": compiled_blocks,
    "bf16 params": bf16_params(eager),
    "bf16 params, cuda graph": bf16_params(cuda_graph),
    "bf16 params, compiled blocks": bf16_params(compiled_blocks),
    "bf16 params, compiled blocks, cuda graph": bf16_params(compiled_blocks_in_a_graph),
}
