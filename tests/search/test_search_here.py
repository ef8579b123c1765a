"""A real search with real runs on this machine, killed in the middle and continued."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml
from support.searches import PATIENCE_S, SPACE, kill_once, search, table_of
from support.tiny_runs import write_recipe

from hpc_oialr.train.load_config import load_config

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'hpc_oialr[search]'")


def begun(folder: Path, number: int) -> bool:
    """Whether a trial has a checkpoint."""
    return any((folder / f"trial_{number:04d}" / "checkpoints").glob("step_*"))


@pytest.mark.long
@pytest.mark.slow
def test_killed_and_continued(tmp_path):
    """One run goes on while nobody watches it, one is killed together with the search and resumes."""
    recipe = write_recipe(tmp_path, train={"steps": 400, "evaluations": 4}, checkpoint={"every": 20})
    (tmp_path / "space.yaml").write_text(SPACE)
    folder = tmp_path / "found"
    words = [str(recipe), "--space", "space.yaml", "--trials", "3", "--parallel", "2", "--executor", "local"]
    words += ["--no-pruning", "--out", "found", "--train.seed", "5"]
    kill_once(search(words, os.environ, tmp_path), lambda: all(begun(folder, number) for number in (0, 1)))
    os.kill(json.loads((folder / "trial_0001" / "owner.json").read_text())["pid"], signal.SIGKILL)
    said, _ = search(words, os.environ, tmp_path).communicate(timeout=PATIENCE_S)
    assert "trial 0: taken up again" in said, said
    assert "trial 1: runs again from its last checkpoint" in said, said
    rows = table_of(folder)
    assert [row["state"] for row in rows] == ["complete"] * 3, said
    best = min(rows, key=lambda row: float(row["metric"]))
    assert [row["trial"] for row in rows if row["best"] == "True"] == [best["trial"]]
    config = load_config(folder / "best.yaml").config
    assert config.optimizer.lr == pytest.approx(float(best["optimizer.lr"]), rel=1e-12)
    assert config.train.seed == 5
    # All the same settings but what is searched.
    other = yaml.safe_load((folder / f"trial_{int(best['trial']):04d}" / "config.yaml").read_text())
    assert yaml.safe_load(Path(folder / "best.yaml").read_text()) == other
    assert "beats the recipe itself" in said
