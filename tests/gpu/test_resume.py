"""Train, convert, cut, write a checkpoint, resume in a fresh process: the run goes on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.gpu_loop import settings
from support.tiny_runs import write_text_folder

from hpc_oialr.data import TextFolder
from hpc_oialr.distributed import World
from hpc_oialr.models import GPT2
from hpc_oialr.train import checkpoint
from hpc_oialr.train.async_checkpoint import AsyncCheckpoints
from hpc_oialr.train.checkpoint_store import CheckpointStore
from hpc_oialr.train.config import Precision, RunConfig, TrainConfig
from hpc_oialr.train.optimizers import AdamW, MuonAdamW, OptimizerConfig
from hpc_oialr.train.run_context import RunContext, make_run_context
from hpc_oialr.train.tasks import LanguageModelling
from hpc_oialr.train.timing import Timers
from hpc_oialr.train.trainer import forward_backward

pytestmark = pytest.mark.gpu

STEPS = 12


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text_folder(tmp_path / "text")


def new_session(text: Path, device: torch.device, optimizer: OptimizerConfig, precision: Precision) -> RunContext:
    config = RunConfig(
        data=TextFolder(path=str(text), sequence_length=32, validation_fraction=0.2, test_fraction=0.2),
        model=GPT2(dim=64, depth=2, heads=4),
        task=LanguageModelling(),
        optimizer=optimizer,
        oialr=settings(delay=3, frequency=2),
        train=TrainConfig(steps=STEPS, global_batch=8, precision=precision, gradient_clip=1.0),
    )
    return make_run_context(config, World.single(device))


def go_on(context: RunContext, first: int, last: int) -> Iterator[float]:
    """The loop of :class:`hpc_oialr.train.trainer.Trainer`, steps ``first`` to ``last``."""
    step, epoch = first, first // len(context.batches)
    while step < last:
        for batch in context.batches.epoch(epoch, step % len(context.batches)):
            context.rates.set(step)
            loss = forward_backward(context, batch, step)
            trained = [p for p in context.module.parameters() if p.requires_grad]
            context.engine.update(context.optimizer, context.scaler, trained, 1.0)
            context.controller.step()
            yield float(loss)
            step += 1
            if step == last:
                return
        epoch += 1


@pytest.mark.parametrize("optimizer", [AdamW(), AdamW(fused=True), MuonAdamW()], ids=["AdamW", "fused", "Muon"])
@pytest.mark.parametrize(
    ("saved", "precision"),
    [(2, "fp32"), (6, "fp32"), (6, "bf16"), (6, "fp16")],
    ids=["dense", "after a cut", "after a cut, bf16", "after a cut, fp16"],
)
def test_a_resumed_run_goes_on(
    saved: int,
    optimizer: OptimizerConfig,
    precision: Precision,
    text: Path,
    tmp_path: Path,
    device: torch.device,
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", World.single(device))
    first = new_session(text, device, optimizer, precision)
    list(go_on(first, 0, saved))
    checkpoint.save(store, first, checkpoint.Progress(step=saved), Timers(device), {"seed": 0})
    expected = list(go_on(first, saved, STEPS))
    second = new_session(text, device, optimizer, precision)
    assert checkpoint.load(store, saved, second, Timers(device), {"seed": 0}).step == saved
    for p in second.module.parameters():
        assert p.device.type == device.type
    found = list(go_on(second, saved, STEPS))
    # Attention and embeddings add up in no fixed order on a GPU.
    assert found == (expected if device.type == "cpu" else pytest.approx(expected, rel=2e-3))
    assert second.controller.r == first.controller.r
    assert min(first.controller.r.values()) == 16


def test_what_is_written_beside_the_training_is_of_its_step(text: Path, tmp_path: Path, device: torch.device) -> None:
    """The parameters change before the thread is done with their copies."""
    world = World.single(device)
    store = CheckpointStore(tmp_path / "checkpoints", world)
    first, writer = new_session(text, device, AdamW(), "fp32"), AsyncCheckpoints(store, world)
    for saved in (4, 6):
        list(go_on(first, saved - 2 if saved > 4 else 0, saved))
        if saved == 6:
            writer.wait()
        checkpoint.save(writer, first, checkpoint.Progress(step=saved), Timers(device), {"seed": 0})
    expected = list(go_on(first, 6, STEPS))
    assert writer.wait() > 0
    writer.close()
    second = new_session(text, device, AdamW(), "fp32")
    assert checkpoint.load(store, 6, second, Timers(device), {"seed": 0}).step == 6
    found = list(go_on(second, 6, STEPS))
    assert found == (expected if device.type == "cpu" else pytest.approx(expected, rel=2e-3))
