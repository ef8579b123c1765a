"""One run in one job: when the job ends, who may stop it, and what a second job does with the same command."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from unittest import mock

import pytest
import torch
from support.slurm_step import step
from support.tiny_runs import write_recipe
from support.train_workers import losses

from hpc_oialr.cli.main import main
from hpc_oialr.errors import ConfigError, ProcessLostError, WorldError
from hpc_oialr.exit_codes import of_error
from hpc_oialr.launch import job_main
from hpc_oialr.launch.job_main import job_end, run_job, stop_requests
from hpc_oialr.launch.slurm import end_of
from hpc_oialr.train.load_config import load_config

NOW = 1_000.0
JOB = {"SLURM_JOB_ID": "12"}
STEP = step(1, 2, SLURM_JOB_ID="12")


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def end(environ, told=None):
    asked = []
    with (
        mock.patch.object(job_main, "end_of", lambda job: asked.append(job) or told),
        mock.patch.object(time, "time", return_value=NOW),
    ):
        return job_end(environ), asked


def test_no_job_has_no_end():
    assert end({}) == (None, [])


def test_the_jobs_variables_know():
    assert end(JOB | {"SLURM_JOB_END_TIME": "5000"}) == (5000.0, [])


def test_slurm_is_asked_where_they_do_not():
    """Slurm 22.05 does not set the variable; the limit of a job may have been extended since it was set."""
    assert end(JOB, 6000.0) == (6000.0, ["12"])
    assert end(JOB | {"SLURM_JOB_END_TIME": "999"}, 6000.0) == (6000.0, ["12"])
    assert end(JOB, None) == (None, ["12"])


def test_only_the_main_process_asks():
    assert end(STEP, 6000.0) == (None, [])
    assert end(STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, 6000.0) == (6000.0, ["12"])


def test_what_slurm_says(slurm, monkeypatch):
    slurm.answer(show="JobId=12 JobState=RUNNING EndTime=2026-11-24T12:00:00 Command=/a b/c.sh")
    assert end_of("12") == time.mktime((2026, 11, 24, 12, 0, 0, 0, 0, -1))
    slurm.answer(show="JobId=12 EndTime=Unknown")
    assert end_of("12") is None
    monkeypatch.setenv("PATH", "")
    assert end_of("12") is None


@pytest.mark.parametrize("name", ["USR2", "HUP"])
def test_signals_ask_for_a_stop(tmp_path, signals, name):
    loaded = load_config(write_recipe(tmp_path), ["--train.stop_signal", name])
    # A shell that starts pytest behind & lets it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with stop_requests(loaded) as stop:
        assert stop.asked() == ""
        os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
        assert stop.asked() == f"signal {name}"
        for other in ("USR1", "TERM", "HUP"):
            os.kill(os.getpid(), signal.Signals[f"SIG{other}"])
            assert stop.asked() == f"signal {other}"
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked() == "Ctrl-C"


def test_a_limit_that_is_no_number_is_told_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("OIALR_MAX_REQUEUES", "-1")
    with pytest.raises(ConfigError, match="OIALR_MAX_REQUEUES is '-1'"):
        run_job(write_recipe(tmp_path), tmp_path / "run")


def test_a_signal_that_is_none(tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"train.stop_signal is 'KILL' .*; must be one of USR2, USR1, TERM, HUP. USR2 is free",
    ):
        load_config(write_recipe(tmp_path), ["--train.stop_signal", "KILL"])


def test_the_same_call_again(tmp_path, signals):
    """Begun, stopped by a signal, gone on with to the end, left alone: the bits of the undisturbed run."""
    recipe, folder = write_recipe(tmp_path), tmp_path / "run"
    assert run_job(recipe, tmp_path / "whole") == 0

    def strike():
        while not (folder / "metrics.jsonl").exists() or len(losses(folder)) < 5:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGUSR2)

    striker = threading.Thread(target=strike)
    striker.start()
    assert run_job(recipe, folder) == 75
    striker.join()
    assert not (folder / "summary.json").exists()
    assert run_job(recipe, folder) == 0
    assert losses(folder) == losses(tmp_path / "whole")
    weights = [
        json.loads((path / "summary.json").read_text())["weights_sha256"] for path in (folder, tmp_path / "whole")
    ]
    assert weights[0] == weights[1]
    before = (folder / "summary.json").stat().st_mtime_ns
    assert run_job(recipe, folder) == 0
    assert (folder / "summary.json").stat().st_mtime_ns == before


def test_dense(tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 4}, dense={"train": {"steps": 3}})
    folder = tmp_path / "run"
    assert main(["train", str(recipe), "--dense", "--out", str(folder), "--record.every", "1"]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["steps"], summary["r"]) == (3, {})


def test_codes_of_errors():
    assert of_error(ProcessLostError("gone")) == 76
    assert of_error(WorldError("disagree")) == 2
