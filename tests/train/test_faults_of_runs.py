"""A run of two processes, one killed, then one stopped: the other leaves in time, and the run ends the same."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.crowd import Crowd, oialr
from support.tiny_runs import write_recipe
from support.train_workers import losses

from hpc_oialr.errors import ConfigError
from hpc_oialr.exit_codes import PROCESS_LOST
from hpc_oialr.record import read_metrics
from hpc_oialr.spectra import Spectra
from hpc_oialr.train.load_config import load_config

TIMEOUT_S = 6.0
TIMES = {"update_s", "svd_s"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(
        tmp_path_factory.mktemp("recipe"),
        train={"steps": 36, "evaluations": 2, "timeout_s": TIMEOUT_S},
        checkpoint={"every": 7},
    )


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with Crowd(oialr, 2, str(folder) + ".log", "train", str(recipe), "--out", str(folder)) as crowd:
        assert [crowd.end(rank)[0] for rank in range(2)] == [0, 0]
    return folder


def steps(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return max((row["step"] for row in read_metrics(path)), default=0) if path.exists() else 0


def strike_at(crowd: Crowd, folder: Path, step: int, victim: int, number: signal.Signals) -> str:
    """Strike once the run has come to a step; what the other process says on standard error."""
    give_up = time.monotonic() + 60
    while steps(folder) < step:
        assert time.monotonic() < give_up
        time.sleep(0.005)
    crowd.strike(victim, number)
    code, _ = crowd.end(1 - victim, TIMEOUT_S + 30)
    assert code == PROCESS_LOST
    return Path(f"{folder}.log.{1 - victim}").read_text()


def updates(folder: Path) -> list[dict[str, Any]]:
    """All events but for their times."""
    rows = read_metrics(folder / "updates.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_killed_stopped_and_resumed(recipe: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log = str(folder) + ".log"
    with Crowd(oialr, 2, log, "train", str(recipe), "--out", str(folder)) as crowd:
        message = strike_at(crowd, folder, 12, victim=0, number=signal.SIGKILL)
        assert "rank 1 of 2: " in message
        assert "Another one has died or hangs: see its log, then resume from the last checkpoint." in message
    with Crowd(oialr, 2, log, "resume", str(folder)) as crowd:
        message = strike_at(crowd, folder, 22, victim=1, number=signal.SIGSTOP)
        assert "rank 0 of 2: " in message
        assert "every rank must take part within the timeout (train.timeout_s)" in message
    with Crowd(oialr, 2, log, "resume", str(folder)) as crowd:
        assert [crowd.end(rank)[0] for rank in range(2)] == [0, 0]
    expected, found = (json.loads((run / "summary.json").read_text()) for run in (whole, folder))
    assert found["weights_sha256"] == expected["weights_sha256"]
    assert losses(folder) == losses(whole)
    assert updates(folder) == updates(whole)
    spectra = Spectra(folder)
    for name, layer in Spectra(whole).items():
        again = spectra[name]
        assert again.t.tolist() == layer.t.tolist()
        assert np.array_equal(again.singular_values, layer.singular_values, equal_nan=True)


def test_the_main_process_knows_the_times_of_all(whole: Path) -> None:
    layers = Spectra(whole)
    assert len(layers) > 2
    assert all((layer["seconds"] > 0).all() for layer in layers.values())
    rows = read_metrics(whole / "updates.jsonl")
    assert [row["step"] for row in rows] == next(iter(layers.values())).t.tolist()
    for i, row in enumerate(rows):
        assert len(row["update_s"]) == 2
        assert row["svd_s"] == pytest.approx(sum(layer["seconds"][i] for layer in layers.values()), rel=1e-12)
        assert 0 < row["svd_s"] < sum(row["update_s"])
        assert row["r_mean"] == np.mean([layer.r[i] for layer in layers.values()])
        assert row["stable_rank_mean"] == pytest.approx(
            np.mean([_stable_rank(layer.singular_values[i]) for layer in layers.values()]), rel=1e-12
        )


def _stable_rank(s: Any) -> float:
    s = s[~np.isnan(s)].astype(np.float64)
    return float((s**2).sum() / s.max() ** 2)


def test_progress_shows_both_processes(whole: Path) -> None:
    shown = Path(f"{whole}.log.0").read_text()
    assert "step 6: conversion of " in shown
    assert " s on the fastest of 2 ranks, SVDs 0." in shown


@pytest.mark.parametrize("value", [0.5, 90_000.0])
def test_a_timeout_that_is_none(recipe: Path, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"train\.timeout_s is {value}.*; must lie in \[1, 86400\]"):
        load_config(recipe, ["--train.timeout_s", str(value)])
