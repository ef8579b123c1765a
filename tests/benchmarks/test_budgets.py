"""The runs of `benchmarks.budgets`: schedules that scale with the budget, and calls that go on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import budgets
from hpc_oialr.recipes import find_recipe
from hpc_oialr.train.load_config import load_config


def test_schedules_scale_with_the_budget() -> None:
    assert budgets.settings("OIALR", 14) == [
        "--oialr.delay", "224", "--oialr.frequency", "240", "--train.epochs", "14", *budgets.FLIP,
    ]  # fmt: skip
    assert [budgets.dense_rate(epochs) for epochs in (0.5, 1, 2, 4)] == [0.005, 0.005, 0.005, 0.0025]
    muon = ["--optimizer.dense_algorithm", "muon", "--optimizer.lr", "0.005"]
    assert budgets.settings("dense", 0.5) == ["--oialr", "null", *muon, "--train.epochs", "0.5", *budgets.FLIP]


def test_the_child_finds_the_clock_it_replaces() -> None:
    done = subprocess.run([sys.executable, "-c", budgets.CHILD, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_its_own_length_is_the_recipe() -> None:
    """Otherwise the longer runs would be scaled from something else."""
    text = find_recipe("fashion_mnist_vit").read_text()
    for line in (f"delay: {budgets.DELAY}", f"frequency: {budgets.FREQUENCY}", f"epochs: {budgets.EPOCHS}"):
        assert line in text


def test_trials_are_settings_of_the_recipe() -> None:
    recipe = find_recipe("fashion_mnist_vit")
    heads = [budgets.trial(name) for name in budgets.TRIALS]
    trees = [load_config(recipe, head["settings"].split()).tree for head in heads]
    assert [tree["train"]["epochs"] for tree in trees] == [head["epochs"] for head in heads]
    assert all(tree["data"]["init_args"]["validation"] == 5000 for tree in trees)
    assert len({head["settings"] for head in heads}) == len(heads)


def test_a_second_call_runs_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[tuple[str, float, int]] = []

    def run(head: budgets.Row) -> budgets.Row:
        started.append((head["run"], head["epochs"], head["seed"]))
        if len(started) == 3:
            raise SystemExit("killed")
        return head

    monkeypatch.setattr(budgets, "run", run)
    out = tmp_path / "budgets.json"
    monkeypatch.setattr(sys, "argv", ["budgets", "--out", str(out)])
    with pytest.raises(SystemExit, match="killed"):
        budgets.main()
    budgets.main()
    jobs = [(*job, 0) for job in budgets.runs(budgets.TIMES)]
    assert sorted(started) == sorted([*jobs, jobs[2]]), "the one that was killed is run again"
    assert len(json.loads(out.read_text())["rows"]) == 2 * len(budgets.TIMES)
