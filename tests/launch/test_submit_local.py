"""A real little run on two processes, by submitit's local executor."""

from __future__ import annotations

import json
import time
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
from support.tiny_runs import write_recipe

from hpc_oialr.cli.main import main
from hpc_oialr.distributed import launch_info
from hpc_oialr.launch import submit
from hpc_oialr.launch.jobs import find_runs, rows_of
from hpc_oialr.launch.slurm import Slurm
from hpc_oialr.record.run_folder import RunFolder

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'hpc_oialr[slurm]'")


def test_two_processes(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = write_recipe(tmp_path, train={"steps": 10})
    monkeypatch.setenv("SBATCH_CLUSTERS", "far")  # Slurm's, which is not asked
    (job,) = submit(recipe, folder="runs/first", executor="local", tasks_per_node=2)
    assert type(job).__name__ == "OwnLocalJob", "its results are read safely"
    (row,) = rows_of(find_runs(), Slurm())
    assert (row.job.job_id, row.state.state) == (job.job_id, "RUNNING")
    summary, nothing = job.results()
    assert (summary["steps"], summary["world_size"], nothing) == (10, 2, None)
    assert job.result() == summary
    (row,) = rows_of(find_runs(), Slurm())
    assert (row.state.state, row.step, row.total_steps) == ("COMPLETED", 10, 10)
    capfd.readouterr()
    assert main(["logs", "runs/first", "-f"]) == 0
    assert "conversion of" in capfd.readouterr().out


def test_place_of_a_process():
    names = {"GLOBALID": "1", "NTASKS": "2", "JOB_ID": "4711"}
    info = launch_info({f"SUBMITIT_LOCAL_{name}": value for name, value in names.items()})
    assert (info.rank, info.size, info.local_rank, info.local_size) == (1, 2, 1, 2)
    assert (info.launcher, info.master_addr) == ("submitit", "127.0.0.1")
    assert 20_000 <= info.master_port < 32_768


def test_a_controller_that_is_killed_takes_its_processes_along(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    recipe = write_recipe(tmp_path, train={"steps": 100_000, "evaluations": 1})
    (job,) = submit(recipe, folder="runs/first", executor="local")
    folder = RunFolder(Path("runs/first"))
    until(lambda: folder.metrics.exists() and folder.metrics.stat().st_size > 0)
    # By hand beside it, or by a second submission: refused, with the holder's name.
    assert f"process {json.loads(folder.owner.read_text())['pid']} on " in refused("resume", "runs/first")
    job._process.kill()
    job._process.wait()
    until(lambda: not folder.owner.exists())
    assert list(folder.checkpoints.glob("step_*"))


def until(happened):
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


def refused(*words):
    with redirect_stderr(StringIO()) as said:
        assert main(list(words)) == 2
    return said.getvalue()
