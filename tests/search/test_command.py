"""What ``oialr search`` refuses before anything begins."""

from __future__ import annotations

import sys

import pytest
from support.tiny_runs import write_recipe

from hpc_oialr.cli.main import main

LOCAL = ["--executor", "local"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            [*LOCAL, "--objectives", "metric,time"],
            "unknown objective 'time' (from the command line); valid: metric, peak_",
        ),
        ([*LOCAL, "--objectives", "metric,metric"], "objectives is 'metric,metric' (from the command line); must be"),
        ([*LOCAL, "--trials", "0"], "trials is 0 (from the command line); must be at least 1."),
        ([*LOCAL, "--parallel", "-1"], "parallel is -1 (from the command line); must be at least 1."),
        ([*LOCAL, "--nodes", "2"], "nodes is 2 (from the command line); must be 1 with the executor 'local'"),
        (
            ["--executor", "debug"],
            "executor is 'debug' (from the command line); must be slurm or local: trials run beside",
        ),
        ([], "executor is 'slurm'; needs sbatch, which is not here. On a machine without Slurm: --executor local."),
        (LOCAL, "unknown search space 'tiny'; valid: autoformer_etth1"),
    ],
)
def test_refused(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["search", str(write_recipe(tmp_path)), *words, "--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_optuna(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert main(["search", str(write_recipe(tmp_path)), *LOCAL, "--out", str(tmp_path / "out")]) == 2
    assert "A search needs optuna. Install it with: pip install 'hpc_oialr[search]'" in capsys.readouterr().err
