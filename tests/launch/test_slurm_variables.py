from __future__ import annotations

import os
import sys

import pytest

from hpc_oialr.errors import ConfigError
from hpc_oialr.launch.slurm import _FIELD, NoAnswerError, ask

SAY = [sys.executable, "-c", "import os; print(sorted(n for n in os.environ if n.startswith('S')))"]


def test_variables_that_change_output_are_not_passed_on(monkeypatch):
    for name in ("SQUEUE_PARTITION", "SACCT_FORMAT", "SLURM_TIME_FORMAT", "SLURM_CONF", "SLURM_JOB_ID"):
        monkeypatch.setenv(name, "x")
    said = ask(SAY).stdout
    assert not any(name in said for name in ("SQUEUE", "SACCT", "TIME_FORMAT"))
    assert "SLURM_CONF" in said
    assert "SLURM_JOB_ID" in said


def test_a_program_that_hangs_is_named():
    with pytest.raises(NoAnswerError, match="does not answer within 0.3 s"):
        ask([sys.executable, "-c", "import time; time.sleep(30)"], timeout_s=0.3)


def test_paths_with_blanks_are_whole():
    line = "JobId=12 JobName=my run StdOut=/home/me/my runs/first %j.out Power= NtasksPerN:B:S:C=0:0:*:*"
    fields = dict(_FIELD.findall(line))
    assert fields["StdOut"] == "/home/me/my runs/first %j.out"
    assert (fields["JobName"], fields["Power"]) == ("my run", "")


def test_the_users_defaults_of_sbatch_do_not_go_over_the_script(monkeypatch):
    executors = pytest.importorskip("hpc_oialr.launch.executors")
    kept, dropped = (
        {"SBATCH_ACCOUNT": "mine"},
        {"SBATCH_SIGNAL": "B:USR1@5", "SBATCH_WAIT": "1", "SBATCH_TIMELIMIT": "1"},
    )
    for name, value in {**kept, **dropped}.items():
        monkeypatch.setenv(name, value)
    with executors.only_as_written("#!/bin/bash\n#SBATCH --signal=USR2@60\n#SBATCH --nodes=2\nsrun x\n"):
        inside = dict(os.environ)
    assert inside["SBATCH_ACCOUNT"] == "mine"
    assert not set(dropped) & set(inside)
    assert os.environ["SBATCH_SIGNAL"] == "B:USR1@5"
    monkeypatch.setenv("SBATCH_CLUSTERS", "far")
    refused = r"SBATCH_CLUSTERS is 'far'; must be that of SLURM_CLUSTERS, '', which squeue and scancel read"
    with pytest.raises(ConfigError, match=refused), executors.only_as_written(""):
        pass
