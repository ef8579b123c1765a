"""What becomes of a job whose run has ended."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hpc_oialr.launch.requeue import Decision, decide, main
from hpc_oialr.processes.batch_job import BatchJob

RUNNING = {"JobState": "RUNNING", "Reason": "None"}
JOB = BatchJob("12", restarts=2)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (75, "stopped with a checkpoint; requeue 3 of 20"),
        (76, "a process was lost; requeue 3 of 20"),
        (137, "killed by signal 9; requeue 3 of 20"),
        (134, "killed by signal 6; requeue 3 of 20"),
    ],
)
def test_it_goes_on(code, text):
    assert decide(code, JOB, 20, RUNNING) == Decision(True, text)
    assert decide(code, JOB, 20, {}) == Decision(True, text), "Slurm says nothing"


@pytest.mark.parametrize("code", [0, 1, 2, 74, 128, 130, 255])
def test_it_is_over(code):
    assert decide(code, JOB, 20, RUNNING) == Decision(False, "")


def test_so_often_and_no_more():
    assert decide(75, JOB, 3, RUNNING).requeue
    over = decide(75, JOB, 2, RUNNING)
    assert not over.requeue
    assert over.text == (
        "stopped with a checkpoint; job 12 was requeued 2 times, of 2. To go on: submit the same command with the "
        "same run folder again, or raise OIALR_MAX_REQUEUES above 2"
    )


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", "CANCELLED"])
def test_slurm_has_decided_already(state):
    """scancel, scontrol requeue and preemption end the job; a requeue now would bring a cancelled job back."""
    decision = decide(75, JOB, 20, {"JobState": state, "Reason": "None"})
    assert not decision.requeue
    assert decision.text == "stopped with a checkpoint; Slurm ends job 12 itself, nothing to do"
    assert decide(75, JOB, 20, {"JobState": state, "Reason": "TimeLimit"}).requeue


def run(monkeypatch, code, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = []
    assert main([str(code)], said.append) == code
    return "".join(said)


def test_the_program_asks_and_requeues(slurm, monkeypatch):
    said = run(monkeypatch, 75, SLURM_JOB_ID="12", SLURM_RESTART_COUNT="4", OIALR_MAX_REQUEUES="9")
    assert said == "oialr: stopped with a checkpoint; requeue 5 of 9\n"
    assert slurm.calls == [["scontrol", "--oneliner", "show", "job", "12"], ["scontrol", "requeue", "12"]]


def test_without_slurms_programs(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    said = run(monkeypatch, 137, SLURM_JOB_ID="12")
    assert said.splitlines() == [
        "oialr: killed by signal 9; requeue 1 of 20",
        "oialr: scontrol requeue 12: there is no scontrol here. Where Slurm's programs are, outside of a container, "
        "type: scontrol requeue 12",
    ]


def test_slurm_refuses(slurm, monkeypatch):
    program = slurm.folder / "bin" / "scontrol"
    program.write_text("#!/bin/sh\necho 'only batch jobs are accepted' >&2; exit 1\n")
    assert "scontrol requeue 12: only batch jobs are accepted" in run(monkeypatch, 75, SLURM_JOB_ID="12")


def test_outside_a_job_and_after_the_end_nothing_happens(slurm, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert run(monkeypatch, 75) == ""
    assert run(monkeypatch, 0, SLURM_JOB_ID="12") == ""
    assert slurm.calls == []


def test_a_limit_that_is_no_number(slurm, monkeypatch):
    said = run(monkeypatch, 75, SLURM_JOB_ID="12", OIALR_MAX_REQUEUES="often")
    assert said == "oialr: OIALR_MAX_REQUEUES is 'often' (from the environment); must be a whole number.\n"
    assert ["scontrol", "requeue", "12"] not in slurm.calls


def test_wrong_usage():
    said = []
    assert main(["$?"], said.append) == 2
    assert said == ["usage: python -m hpc_oialr.launch.requeue EXIT_CODE_OF_THE_RUN\n"]


def test_it_is_light():
    """Slurm kills what takes long at the end of a job."""
    code = "import sys, hpc_oialr.launch.requeue, hpc_oialr.launch.life; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
