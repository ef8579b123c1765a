"""What a run ran on."""

from __future__ import annotations

import json
import subprocess
from datetime import datetime
from pathlib import Path

import pytest
import torch

from hpc_oialr.record import environment_report
from hpc_oialr.record.environment_report import _git, _output


def test_versions_and_machine() -> None:
    report = environment_report()
    assert json.loads(json.dumps(report)) == report
    assert report["packages"]["torch"] == torch.__version__
    assert report["libraries"]["hdf5"].count(".") >= 2
    assert report["machine"]["memory_gib"] > 0.5
    assert 1 <= report["machine"]["usable_cores"] <= report["machine"]["cores"]
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert datetime.fromisoformat(report["date"]).utcoffset().total_seconds() == 0
    assert set(report["packages"]) >= {"transformers", "deepspeed", "mpi4py", "submitit"}
    assert set(report["libraries"]) == {"cuda", "nccl", "mpi", "hdf5"}


def test_secrets_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NCCL_TOKEN", "OIALR_KEY", "WANDB_API_KEY", "TORCH_PASSWORD", "SLURM_JWT", "HDF5_SECRET"):
        monkeypatch.setenv(name, "s3cret")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    text = json.dumps(environment_report())
    assert "s3cret" not in text
    assert "4711" in text


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_of_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "errors.py").write_text("a = 1\n")
    assert _git(tmp_path) is None
    git(tmp_path, "init")
    assert _git(tmp_path) is None, "inside somebody else's repository, but not of it"
    git(tmp_path, "add", "errors.py")
    git(tmp_path, "commit", "-m", "first")
    assert _git(tmp_path) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "errors.py").write_text("a = 2\n")
    assert _git(tmp_path) == {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": True}


def test_programs_that_are_missing_or_fail_say_nothing() -> None:
    assert _output(("surely-no-such-program",)) is None
    assert _output(("false",)) is None
    assert _output(("echo", "words")) == "words\n"
