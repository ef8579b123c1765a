"""MFU against operations counted by hand, and traces of steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.spawn import spawn
from support.tiny_runs import write_recipe
from support.train_workers import losses, train_worker

from hpc_oialr.distributed import World
from hpc_oialr.record import read_metrics
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import train
from hpc_oialr.train.utilisation import Utilisation, known_peak


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-params", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp32", 494.5e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-40GB", "fp16", 312e12),
        ("NVIDIA A100-SXM4-40GB", "float64", None),
        ("NVIDIA T4", "bf16", None),
        ("", "bf16", None),
    ],
)
def test_peaks_of_data_sheets(name: str, precision: str, peak: float | None) -> None:
    assert known_peak(name, precision, tf32=True) == peak
    assert known_peak(name, "fp32", tf32=False) is None


def test_one_step_is_counted_until_it_is_forgotten(tmp_path: Path) -> None:
    config = load_config(write_recipe(tmp_path), ["--train.peak_tflops", "1e-6"]).config
    found, a, b = Utilisation(config, torch.device("cpu")), torch.ones(10, 20), torch.ones(20, 30)
    assert found.mfu(1.0) is None
    for count in (1, 5):
        with found.counting():
            for _ in range(count):
                a @ b
        # 2 x 10 x 20 x 30 operations a step, 50 steps a second, of a million.
        assert found.mfu(50.0) == pytest.approx(12_000 * 50 / 1e6)
    found.forget()
    with found.counting():
        a @ a.mT
    assert found.mfu(1.0) == pytest.approx(4_000 / 1e6)


def test_a_run_shows_its_mfu_and_writes_a_trace(tmp_path: Path) -> None:
    recipe, world = write_recipe(tmp_path), World.single("cpu")
    plain = train(load_config(recipe), tmp_path / "plain", world=world)
    assert plain.summary["mfu"] is None
    assert not any("mfu" in row for row in read_metrics(tmp_path / "plain" / "metrics.jsonl"))
    assert not (tmp_path / "plain" / "profile").exists()
    settings = ["--train.peak_tflops", "0.01", "--train.profile", "3"]
    result = train(load_config(recipe, settings), tmp_path / "run", world=world)
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert result.summary["weights_sha256"] == plain.summary["weights_sha256"]
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert min(row["mfu"] for row in rows if "metric" not in row) > 0
    assert result.summary["mfu"] > 0
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    names = {event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]}
    assert trace.name == "rank0.json"
    assert {f"ProfilerStep#{i}" for i in (10, 11, 12)} <= names
    assert "ProfilerStep#13" not in names
    assert any("aten::mm" in name or "aten::addmm" in name for name in names)


def test_each_rank_that_is_asked_writes_one(tmp_path: Path) -> None:
    over = {"train": {"steps": 11, "profile": 5, "profile_ranks": [1]}, "oialr": None}
    spawn(train_worker, 2, str(write_recipe(tmp_path, **over)), str(tmp_path / "run"))
    # The run ends before the five steps have been made.
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "rank1.json"
    assert json.loads(trace.read_text())["traceEvents"]
