"""What becomes of a job whose run has ended: requeue.sh, by a plain sh."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hpc_oialr.launch

SCRIPT = Path(hpc_oialr.launch.__file__).with_name("requeue.sh")
ASKED = ["scontrol", "--oneliner", "show", "job", "12"]
REQUEUED = ["scontrol", "requeue", "12"]


def run(code: object, **variables: str) -> tuple[int, str]:
    """Its exit code, and what it says."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OIALR_"))}
    sh = shutil.which("dash") or "/bin/sh"
    environ = kept | {"SLURM_JOB_ID": "12"} | variables
    done = subprocess.run([sh, str(SCRIPT), str(code)], env=environ, capture_output=True, text=True, check=False)
    assert done.stdout == ""
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (75, "stopped with a checkpoint; requeue 3 of 20"),
        (76, "a process was lost; requeue 3 of 20"),
        (137, "killed by signal 9; requeue 3 of 20"),
        (192, "killed by signal 64; requeue 3 of 20"),
    ],
)
def test_it_goes_on(slurm, code, text):
    slurm.answer(show="JobId=12 JobState=RUNNING Reason=None")
    assert run(code, SLURM_RESTART_COUNT="2") == (code, f"oialr: {text}\n")
    assert slurm.calls == [ASKED, REQUEUED]


@pytest.mark.parametrize("code", [0, 1, 2, 74, 128, 130, 202, 255])
def test_it_is_over(slurm, code):
    assert run(code) == (code, "")
    assert slurm.calls == []


def test_so_often_and_no_more(slurm):
    assert run(75, SLURM_RESTART_COUNT="2", OIALR_MAX_REQUEUES="3")[1].endswith("requeue 3 of 3\n")
    assert run(75, SLURM_RESTART_COUNT="2", OIALR_MAX_REQUEUES="2")[1] == (
        "oialr: stopped with a checkpoint; job 12 was requeued 2 times, of 2. To continue: submit the same command with "
        "the same run folder again, or raise OIALR_MAX_REQUEUES above 2\n"
    )
    assert run(75, OIALR_MAX_REQUEUES="often")[1] == (
        "oialr: OIALR_MAX_REQUEUES is 'often' (from the environment); must be a whole number.\n"
    )
    assert slurm.calls.count(REQUEUED) == 1


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING"])
def test_slurm_has_decided_already(slurm, state):
    """scancel, scontrol requeue and preemption end the job; a requeue now would bring a cancelled job back."""
    slurm.answer(show=f"JobId=12 JobState={state} Reason=None")
    assert run(75)[1] == "oialr: stopped with a checkpoint; Slurm ends job 12 itself, nothing to do\n"
    slurm.answer(show=f"JobId=12 JobState={state} Reason=TimeLimit Dependency=(null)")
    run(75)
    assert slurm.calls == [ASKED, ASKED, REQUEUED]


def test_a_task_of_an_array_is_named_as_such(slurm):
    run(75, SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="1")
    assert slurm.calls[-1] == ["scontrol", "requeue", "12_1"]


def test_without_slurms_programs_and_if_they_refuse(slurm, tmp_path):
    assert run(137, PATH=str(tmp_path))[1].splitlines() == [
        "oialr: killed by signal 9; requeue 1 of 20",
        "oialr: scontrol requeue 12: there is no scontrol here. Where Slurm's programs are, outside of a container, "
        "type: scontrol requeue 12",
    ]
    program = slurm.folder / "bin" / "scontrol"
    program.write_text("#!/bin/sh\necho 'only batch jobs are accepted' >&2; exit 1\n")
    assert "scontrol requeue 12: only batch jobs are accepted" in run(75)[1]


def test_outside_a_job_and_wrong_usage(slurm):
    assert run(75, SLURM_JOB_ID="") == (75, "")
    assert run("$?") == (2, "usage: requeue.sh EXIT_CODE_OF_THE_RUN\n")
    assert slurm.calls == []


def test_it_is_light():
    """What every process of a job imports before its run."""
    code = "import sys, hpc_oialr.launch.job_main; print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
