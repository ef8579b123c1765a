"""The main program of a job's processes: whose pickles it reads, and with which code it leaves."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from hpc_oialr.errors import OIALRError, ProcessLostError
from hpc_oialr.launch import job_main, task
from hpc_oialr.launch.job_main import RecipeRun
from hpc_oialr.launch.task import require_own
from hpc_oialr.record import RunFolder

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'hpc_oialr[slurm]'")


@pytest.fixture
def job(tmp_path, monkeypatch, signals):
    """A submitted call in a folder of its own, in the environment of its only process."""
    from submitit.core.utils import DelayedSubmission

    folder = tmp_path / "submitit"
    folder.mkdir(mode=0o700)
    names = {
        "JOB_ID": "7",
        "NTASKS": "1",
        "JOB_NUM_NODES": "1",
        "NODEID": "0",
        "GLOBALID": "0",
        "LOCALID": "0",
    }
    for name, value in names.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", value)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "")
    monkeypatch.setenv("SUBMITIT_FOLDER", "")
    call = RecipeRun("recipe", tmp_path / "run", ("--train.steps", "3"))
    DelayedSubmission(call).dump(folder / "7_submitted.pkl")
    return folder


def result_of(folder):
    from submitit.core.utils import pickle_load

    path = folder / "7_0_result.pkl"
    return pickle_load(path) if path.exists() else None


def test_a_finished_run_leaves_its_summary(job, tmp_path, monkeypatch):
    def run_job(recipe, folder, settings):
        assert (recipe, settings) == ("recipe", ("--train.steps", "3"))
        RunFolder(folder).create().write_summary({"metric": 0.5})
        return 0

    monkeypatch.setattr(job_main, "run_job", run_job)
    task.main(job)
    assert result_of(job) == ("success", {"metric": 0.5})


def test_a_stopped_run_leaves_its_code_and_no_result(job, monkeypatch):
    monkeypatch.setattr(job_main, "run_job", lambda *_: 75)
    with pytest.raises(SystemExit) as left:
        task.main(job)
    assert left.value.code == 75
    assert result_of(job) is None


def test_a_run_that_lost_a_process_does_too(job, monkeypatch, capsys):
    def run_job(*_):
        raise ProcessLostError("process 0 of 2: a barrier failed")

    monkeypatch.setattr(job_main, "run_job", run_job)
    with pytest.raises(SystemExit) as left:
        task.main(job)
    assert left.value.code == 76
    assert result_of(job) is None
    assert capsys.readouterr().err.endswith("oialr: error: process 0 of 2: a barrier failed\n")


def test_an_error_is_the_result(job, monkeypatch):
    def run_job(*_):
        raise OIALRError("settings do not fit")

    monkeypatch.setattr(job_main, "run_job", run_job)
    with pytest.raises(OIALRError, match="settings do not fit"):
        task.main(job)
    outcome, trace = result_of(job)
    assert outcome == "error"
    assert "OIALRError: settings do not fit" in trace


def test_a_job_of_another_version_says_what_to_do(job):
    file = job / "7_submitted.pkl"
    file.write_bytes(file.read_bytes().replace(b"hpc_oialr.launch.job_main", b"hpc_oialr.launch.job_life"))
    with pytest.raises(OIALRError, match=r"another version .*job_life.*\. Submit the run again, with the same --out"):
        task.main(job)


def test_submitit_does_not_listen_to_the_warning(job, monkeypatch):
    """A fresh interpreter: submitit reads the name of its signal when it is imported."""
    program = (
        "import signal, sys; from pathlib import Path; from hpc_oialr.launch import job_main, task\n"
        "def run_job(*_):\n"
        "    print(signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL, signal.getsignal(signal.SIGURG))\n"
        "    return 75\n"
        "job_main.run_job = run_job; sys.argv[1:] = [sys.argv[1]]; task.entry()"
    )
    done = subprocess.run([sys.executable, "-c", program, str(job)], capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    assert "True <bound method SignalHandler.checkpoint_and_try_requeue" in done.stdout


def test_the_exit_code_of_a_users_mistake(job):
    command = [sys.executable, "-m", "hpc_oialr.launch.task", str(job)]
    job.chmod(0o770)
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"oialr: error: {job} has mode 0770; pickles are read only where nobody else can")


# -- whose pickles -------------------------------------------------------------------------------


def test_own_closed_folder(tmp_path):
    tmp_path.chmod(0o700)
    file = tmp_path / "result.pkl"
    file.touch()
    file.chmod(0o666)
    require_own(tmp_path, file)
    tmp_path.chmod(0o755)
    with pytest.raises(OIALRError, match=r"result.pkl has mode 0666; .* If you trust what is there: chmod go-w"):
        require_own(tmp_path, file)
    file.chmod(0o644)
    require_own(tmp_path, file)


def test_folder_of_another_user(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(OIALRError, match=r"belongs to user \d+; pickles are read only from what belongs to you"):
        require_own(tmp_path)


def test_results_are_read_from_ones_own_folder_only(job, tmp_path, monkeypatch):
    from hpc_oialr.launch.executors import OwnLocalJob

    monkeypatch.setattr(job_main, "run_job", lambda *_: 0)
    RunFolder(tmp_path / "run").create().write_summary({"metric": 0.5})
    task.main(job)
    submitted = OwnLocalJob(job, "7")
    assert submitted.result() == {"metric": 0.5}
    assert isinstance(submitted.submission().function, RecipeRun)
    job.chmod(stat.S_IRWXU | stat.S_IRWXO)
    for read in (submitted.result, submitted.submission):
        with pytest.raises(OIALRError, match=r"has mode 0707; pickles are read only"):
            read()
