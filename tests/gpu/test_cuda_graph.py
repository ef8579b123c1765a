"""Whole training runs with a CUDA graph of the step and without: the same losses, the same r, also resumed in between."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from support.replays import allow_on_cpu
from support.tiny_runs import merged, write_recipe
from support.train_workers import stop_at_step
from torch import nn

from hpc_oialr.distributed import World
from hpc_oialr.record import read_metrics
from hpc_oialr.train.cuda_graph import CaptureError, GraphedStep, capture
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import Result, resume, train

pytestmark = pytest.mark.gpu

# Conversion after step 6, cuts after steps 12 and 18.
SMALL = {
    "model": {"init_args": {"dim": 64, "heads": 4, "depth": 2}},
    "oialr": {"frequency": 6, "limits": {"round_to": 8}},
    "train": {"device": None},
}


@pytest.fixture(autouse=True)
def _graphs_on_cpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        allow_on_cpu(monkeypatch)


def settings(folder: Path, **over: Any) -> Path:
    """A recipe of 24 steps."""
    return write_recipe(folder, **merged(SMALL, over))


def losses(result: Result) -> list[float]:
    return [row["loss"] for row in read_metrics(result.folder / "metrics.jsonl") if "metric" not in row]


def course_of_r(result: Result) -> tuple[list[tuple[int, float]], dict[str, int]]:
    """The mean r after each conversion and update, and every layer's at the end."""
    assert result.summary is not None
    path = result.folder / "updates.jsonl"
    rows = read_metrics(path) if path.exists() else []
    return [(row["step"], row["r_mean"]) for row in rows], result.summary["r"]


@pytest.mark.parametrize(
    "over",
    [
        {},
        {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.003}}},
        {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.003, "fused": False}}},
        {"optimizer": {"class_path": "SGD", "init_args": {"lr": 0.1}}},
        {"train": {"precision": "bf16"}},
        {"train": {"accumulation": 2, "gradient_clip": 0.5}},
        {"oialr": None},
        {"compile": "blocks"},
    ],
    ids=["Muon", "AdamW", "AdamW unfused", "SGD", "bf16", "accumulated and clipped", "dense", "compiled blocks"],
)
def test_losses_and_r_are_those_of_eager_steps(over: dict[str, Any], tmp_path: Path, device: torch.device) -> None:
    """With dropout: a replay draws the random numbers that an eager step would."""
    if device.type == "cpu" and "compile" in over:
        pytest.skip("compiling for the CPU takes a minute")
    recipe, world = settings(tmp_path, **over), World.single(device)
    on = train(load_config(recipe, ["--train.cuda_graph", "on"]), tmp_path / "on", world=world)
    assert on.summary is not None
    assert on.summary["cuda_graph"] == "on"
    off = train(load_config(recipe, ["--train.cuda_graph", "off"]), tmp_path / "off", world=world)
    # Embeddings add up in no fixed order on a GPU, and rates are fp32 tensors with a graph.
    tolerance = 2e-2 if over.get("train", {}).get("precision") == "bf16" else 2e-3
    assert losses(on) == pytest.approx(losses(off), rel=tolerance)
    assert losses(on)[-1] < losses(on)[0]
    assert course_of_r(on) == course_of_r(off)


def test_a_graph_outlives_updates_that_leave_r_as_it_is(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors, moments and autocast's copies change where they are: one graph of dense steps, one of low-rank ones."""
    made: list[GraphedStep] = []
    keep = GraphedStep.__init__

    def note(self: GraphedStep, *args: Any, **settings: Any) -> None:
        keep(self, *args, **settings)
        made.append(self)

    monkeypatch.setattr(GraphedStep, "__init__", note)
    same_r = {"limits": {"at_conversion": 0.25}, "importance": "weights"}
    recipe, world = settings(tmp_path, oialr=same_r), World.single(device)
    on = train(load_config(recipe, ["--train.cuda_graph", "on"]), tmp_path / "on", world=world)
    assert [step.captures for step in made] == [2]
    off = train(load_config(recipe, ["--train.cuda_graph", "off"]), tmp_path / "off", world=world)
    assert len(course_of_r(on)[0]) == 4, "a conversion and three updates"
    assert losses(on) == pytest.approx(losses(off), rel=2e-3)


def test_resumed_between_two_replays(tmp_path: Path, device: torch.device) -> None:
    recipe, world = load_config(settings(tmp_path), ["--train.cuda_graph", "on"]), World.single(device)
    whole = train(recipe, tmp_path / "whole", world=world)
    train(recipe, tmp_path / "halves", world=world, stop=stop_at_step(11))
    halves = resume(tmp_path / "halves", world=world)
    assert losses(halves) == pytest.approx(losses(whole), rel=2e-3)
    assert course_of_r(halves) == course_of_r(whole)


def test_a_step_that_waits_for_the_host_runs_eagerly_with_the_same_random_numbers(
    device: torch.device,
) -> None:
    """The failed capture has begun a forward pass with dropout, and leaves the generator in order."""
    if device.type == "cpu":
        pytest.skip("every step can be captured on the CPU")
    module = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5)).to(device)
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved(device)

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        loss = module(batch["x"]).square().mean() + torch.zeros(1 << 24, device=device).sum()
        assert loss.item() > 0
        loss.backward()
        module.zero_grad()
        return loss.detach()

    batch = {"x": torch.randn(4, 8)}
    torch.manual_seed(0)
    graphed = GraphedStep(step, module, device)
    found = [float(graphed({"x": batch["x"].to(device)})) for _ in range(6)]
    torch.manual_seed(0)
    assert found == [float(step({"x": batch["x"].to(device)})) for _ in range(6)]
    assert graphed.status.startswith("off: it cannot be captured (")
    assert graphed.status.endswith(": assert loss.item() > 0)"), "the line that cannot be"
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved(device) - before < 1 << 26, "memory of the failed capture is free again"
    # Another capture works after it.
    replay, result = capture(lambda: torch.rand(4, device=device), device)
    replay()
    first = result.clone()
    replay()
    assert not torch.equal(first, result)
    with pytest.raises(CaptureError):
        capture(lambda: torch.rand(4, device=device).tolist(), device)
