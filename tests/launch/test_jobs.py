"""Submitted runs as a table, their logs, and their ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta

import pytest
from support.slurm_step import step

from hpc_oialr.cli.main import main
from hpc_oialr.errors import ConfigError, DataError, OIALRError
from hpc_oialr.launch.job_file import JobFile, follow, last_error, log_files, note_job, read_job
from hpc_oialr.launch.jobs import cancel, find_runs, rows_of, watch_job
from hpc_oialr.launch.slurm import JobState, Slurm
from hpc_oialr.record import RunFolder


def submitted(path, job_id="12", **changes):
    """A folder as a submission leaves it."""
    folder = RunFolder(path).create()
    (path / "submitit").mkdir()
    fields = {
        "executor": "slurm",
        "recipe": "tiny",
        "processes": 2,
        "max_requeues": 20,
        "output": path / "submitit" / f"{job_id}_%t_log.%s",
        "submitted": "2026-01-01T10:00:00+00:00",
    }
    job = JobFile(job_id=job_id, **{**fields, **changes})
    job.write(folder)
    return folder, job


def trained(folder, steps=40):
    """Rows of a run that does a step in half a second."""
    rows = [
        {"step": step, "total_steps": 100, "loss": 1 / step, "wall_s": step / 2, "trained_share": 0.25}
        for step in range(10, steps + 1, 10)
    ]
    rows.insert(2, {"step": 20, "split": "test", "metric_name": "test_accuracy", "metric": 0.75, "wall_s": 10.0})
    folder.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.updates.write_text(json.dumps({"step": 20, "kind": "conversion", "r_mean": 12.5}) + "\n")


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_running_job(slurm, tmp_path):
    folder, _ = submitted(tmp_path / "runs" / "first")
    trained(folder)
    now = datetime.now()
    end = (now + timedelta(seconds=600)).isoformat(timespec="seconds")
    slurm.answer(jobs={"12": {"State": "RUNNING", "RestartCnt": 3, "EndTime": end}, "13": {"State": "PENDING"}})
    (row,) = rows_of(find_runs(), Slurm())
    assert (row.state.state, row.state.requeues, row.error) == ("RUNNING", 3, "")
    assert (row.step, row.total_steps, row.step_s) == (40, 100, 0.5)
    assert (row.metric, row.metric_name, row.r_mean) == (0.75, "test_accuracy", 12.5)
    assert (row.loss, row.trained_share) == (0.025, 0.25)
    assert 0 < row.eta_s <= 30
    assert 500 < row.left_s <= 600
    (call,) = slurm.calls
    assert call[:5] == ["squeue", "--noheader", "--array", "--states=all", f"--user={os.geteuid()}"]


def test_the_time_since_the_last_row_counts(slurm, tmp_path):
    folder, _ = submitted(tmp_path / "runs" / "first")
    trained(folder)
    slurm.answer(jobs={"12": {"State": "RUNNING"}})
    os.utime(folder.metrics, (time.time() - 20,) * 2)
    (row,) = rows_of(find_runs(), Slurm())
    assert 0 < row.eta_s <= 10


def test_table(slurm, tmp_path, capsys):
    running, _ = submitted(tmp_path / "runs" / "first")
    trained(running)
    failed, job = submitted(tmp_path / "runs" / "second", "13", submitted="2026-01-01T11:00:00+00:00")
    job.log(1, "err").write_text("Traceback\n  line\noialr: error: data.path is 'x'; no such folder.\nsrun: error: 2\n")
    done, _ = submitted(tmp_path / "runs" / "many" / "seed_0", "14_0", submitted="2026-01-01T12:00:00+00:00")
    done.write_summary({})
    submitted(tmp_path / "runs" / "many" / "seed_1", "14_1", submitted="2026-01-01T12:00:00+00:00")
    end = (datetime.now() + timedelta(seconds=10)).isoformat(timespec="seconds")
    slurm.answer(
        jobs={
            "12": {"State": "RUNNING", "EndTime": end},
            "13": {"State": "FAILED"},
            "14_0": {"State": "COMPLETED"},
            "14_1": {"State": "PENDING", "Reason": "Resources"},
        }
    )
    code, out, err = run(capsys, "jobs")
    assert (code, err) == (0, "")
    head, _, *lines = [line.strip() for line in out.splitlines() if line.strip()]
    assert " ".join(head.split()) == "job run state requeues step ETA / time left trained mean r loss metric"
    assert lines[0].startswith("12 ")
    assert "40 of 100" in lines[0]
    assert "0 of 20" in lines[0]
    assert ", resumes after a requeue" in lines[0]
    assert "25.0%" in lines[0]
    assert "test_accuracy 0.7500" in lines[0]
    assert lines[1].split() == [
        "13",
        str(failed.path.relative_to(tmp_path)),
        "FAILED",
        "0",
        "of",
        "20",
        *"------",
    ]
    assert "PENDING (Resources)" in lines[2]
    assert lines[3:] == [
        "runs/second: oialr: error: data.path is 'x'; no such folder.",
        "1 completed: oialr jobs --all",
    ]
    assert "14_0" not in out
    assert "14_0" in run(capsys, "jobs", "--all")[1]
    assert "14_0" in run(capsys, "jobs", "runs/many")[1]


def test_no_runs(slurm, capsys):
    assert run(capsys, "jobs")[:2] == (0, "no submitted runs\n")
    code, _, err = run(capsys, "jobs", "nowhere")
    assert code == 2
    assert "nowhere holds no submitted run: there is no nowhere/job.json." in err


def test_without_accounts_the_folder_tells_and_it_is_said_once(slurm, tmp_path, caplog):
    done, _ = submitted(tmp_path / "runs" / "done", "1")
    done.write_summary({})
    submitted(tmp_path / "runs" / "ended", "2", submitted="2026-01-01T11:00:00+00:00")
    slurm_of_cluster = Slurm()
    for _ in range(2):
        rows = rows_of(find_runs(), slurm_of_cluster)
        assert [(row.state.state, row.state.requeues) for row in rows] == [
            ("COMPLETED", None),
            ("ENDED", None),
        ]
    assert [record.message for record in caplog.records] == [
        "no accounts of jobs are kept here (sacct: Slurm accounting storage is disabled): states of those that "
        "Slurm has forgotten are taken from their run folders"
    ]
    assert [call[0] for call in slurm.calls] == ["squeue", "sacct", "squeue"]


def test_accounts(slurm, tmp_path):
    submitted(tmp_path / "runs" / "first")
    slurm.answer(history={"12": ["REQUEUED", "NODE_FAIL", "CANCELLED by 0"]})
    (row,) = rows_of(find_runs(), Slurm())
    assert (row.state.state, row.state.requeues) == ("CANCELLED", 2)
    assert "--jobs=12" in slurm.calls[1]


def test_without_slurm_nothing_is_taken_for_over(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    submitted(tmp_path / "runs" / "first")
    (row,) = rows_of(find_runs(), Slurm())
    assert (row.state.state, row.state.over) == ("UNKNOWN", False)
    assert "Slurm does not answer (squeue: there is no squeue here)" in caplog.text


@pytest.mark.parametrize(
    ("texts", "line"),
    [
        (["Traceback\n  File\nValueError: x\n", "step 3 of 9\n"], "ValueError: x"),
        (["RuntimeError: lost\n", "oialr: error: a\nsrun: error\n"], "oialr: error: a"),
        (["step 3 of 9\nslurmstepd: error: *** JOB 12 CANCELLED ***\n"], "step 3 of 9"),
        (["slurmstepd: error: *** JOB 12 CANCELLED ***\n"], "slurmstepd: error: *** JOB 12 CANCELLED ***"),
        ([], ""),
    ],
)
def test_the_line_that_says_why(tmp_path, texts, line):
    _, job = submitted(tmp_path / "run")
    for process, text in enumerate(texts):
        job.log(process, "err").write_text(text)
    assert last_error(job) == line


def test_a_moved_folder_keeps_its_logs(tmp_path):
    folder, _ = submitted(tmp_path / "run")
    moved = RunFolder(folder.path.rename(tmp_path / "moved"))
    assert read_job(moved).log(0, "out") == tmp_path / "moved" / "submitit" / "12_0_log.out"


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}'])
def test_damaged_job_file(tmp_path, content):
    folder, _ = submitted(tmp_path / "run")
    folder.job.write_text(content)
    with pytest.raises(DataError, match=r"job.json is damaged \(.*\). Remove it; the run itself is not touched."):
        read_job(folder)


# -- runs of batch scripts -----------------------------------------------------------------------


def test_a_batch_script_notes_its_job(slurm, tmp_path, capsys):
    environ = {"SLURM_JOB_ID": "12", "OIALR_MAX_REQUEUES": "3"}
    slurm.answer(show=f"JobId=12 JobState=RUNNING StdErr={tmp_path}/x.err StdOut={tmp_path}/x-12.out")
    folder = RunFolder(tmp_path / "runs" / "first")
    note_job(folder.path, "tiny", environ)
    assert folder.path.stat().st_mode & 0o777 == 0o700
    job = read_job(folder)
    assert (job.job_id, job.executor, job.processes, job.max_requeues) == ("12", "slurm", 1, 3)
    (tmp_path / "x-12.out").write_text("started\noialr: error: no data\n")
    assert last_error(job) == "oialr: error: no data"
    assert run(capsys, "logs", "runs/first")[1] == "started\noialr: error: no data\n"
    before = len(slurm.calls)
    note_job(folder.path, "tiny", {**environ, "SLURM_RESTART_COUNT": "1"})
    assert len(slurm.calls) == before
    note_job(folder.path, "tiny", {**environ, "SLURM_JOB_ID": "13"})
    assert read_job(folder).job_id == "13"


def test_nothing_is_noted_without_a_job_or_by_another_process(slurm, tmp_path):
    note_job(tmp_path / "run", "tiny", {})
    note_job(tmp_path / "run", "tiny", step(1, 2))
    assert not (tmp_path / "run").exists()
    assert slurm.calls == []


# -- logs ----------------------------------------------------------------------------------------


def test_logs(slurm, tmp_path, capsys):
    _, job = submitted(tmp_path / "run")
    job.log(1, "out").write_text("started\n")
    job.log(1, "err").write_text("step 1\nhalf a li")
    assert run(capsys, "logs", tmp_path / "run", "--process", 1)[:2] == (0, "started\nstep 1\nhalf a li")
    assert run(capsys, "logs", tmp_path / "run")[:2] == (0, "")
    with pytest.raises(ConfigError, match=r"process is 2; must lie in \[0, 2\)"):
        log_files(RunFolder(tmp_path / "run"), 2)


def test_logs_of_a_run_that_was_not_submitted(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run").create()
    (folder.logs / "process_0.log").write_text("INFO begun\n")
    assert run(capsys, "logs", tmp_path / "run")[:2] == (0, "INFO begun\n")
    code, _, err = run(capsys, "logs", tmp_path / "run", "--process", 1)
    assert (code, "has no log of process 1" in err) == (2, True)


def test_follow_gives_whole_lines_and_what_came_last(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    script = iter([("a", "one\ntw"), ("a", "o\n"), ("b", "late\n"), ("a", "end")])
    finished = []

    def over():
        return bool(finished)

    def sleep(_):
        step = next(script, None)
        if step is None:
            finished.append(True)
            return
        with (tmp_path / step[0]).open("a") as file:
            file.write(step[1])

    assert list(follow([path, other], over, sleep=sleep)) == ["one\n", "two\n", "late\n", "end"]


def test_following_ends_with_the_job(slurm, tmp_path, capsys):
    _, job = submitted(tmp_path / "run")
    job.log(0, "err").write_text("step 1\n")
    slurm.answer(jobs={"12": {"State": "FAILED"}})
    assert run(capsys, "logs", tmp_path / "run", "-f")[:2] == (0, "step 1\n")


def test_slurm_is_asked_now_and_then_only(slurm, tmp_path):
    _, job = submitted(tmp_path / "run")
    times = [0.0]
    over = watch_job(job, every_s=10, clock=lambda: times[0])
    slurm.answer(jobs={"12": {"State": "RUNNING"}})
    assert [over(), over()] == [False, False]
    assert len(slurm.calls) == 1
    slurm.answer(jobs={"12": {"State": "COMPLETED"}})
    assert not over()
    times[0] = 10.0
    assert [over(), over()] == [True, True]
    assert len(slurm.calls) == 2


# -- cancel --------------------------------------------------------------------------------------


def test_cancel(slurm, tmp_path, capsys):
    submitted(tmp_path / "runs" / "first")
    submitted(tmp_path / "runs" / "many" / "seed_0", "14_0")
    submitted(tmp_path / "runs" / "many" / "seed_1", "14_1")
    code, out, _ = run(capsys, "cancel", "runs/first", "runs/many", "4711", "15_2")
    ids = ["12", "14_0", "14_1", "4711", "15_2"]
    assert (code, out.splitlines()) == (0, [f"cancelled job {job_id}" for job_id in ids])
    assert [call for call in slurm.calls if call[0] == "scancel"] == [["scancel", job_id] for job_id in ids]
    slurm.answer(jobs={"14_1": {"State": "RUNNING"}})
    assert cancel("runs/many") == ["14_1"], "those that are over are left alone"
    with pytest.raises(DataError, match="nonsense holds no submitted run"):
        cancel("nonsense")


def test_cancel_without_slurm(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OIALRError, match=r"job 12 was not cancelled: there is no scancel here."):
        cancel("12")


def test_cancel_of_a_local_job_hits_its_own_process_only(tmp_path):
    """Another process may have the number by now; on another host it means nothing."""
    folder, job = submitted(tmp_path / "run", str(os.getpid()), executor="local")
    with pytest.raises(OIALRError, match=rf"job {job.job_id} is not running on this machine any more"):
        cancel(str(folder.path))
    folder, _ = submitted(tmp_path / "there", "1", executor="local", host="elsewhere")
    with pytest.raises(OIALRError, match=r"job 1 runs on elsewhere, and this is .*. End it there."):
        cancel(str(folder.path))


def test_cancel_of_a_local_job(tmp_path):
    files = str(tmp_path / "run" / "submitit")
    program = "import time; print('ready', flush=True); time.sleep(20)"
    command = [sys.executable, "-c", program, "submitit.local._local", files]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as controller:
        folder, job = submitted(tmp_path / "run", str(controller.pid), executor="local")
        assert controller.stdout.readline() == "ready\n"
        assert not watch_job(job)()
        assert cancel(str(folder.path)) == [str(controller.pid)]
    assert controller.returncode == -signal.SIGTERM
    assert watch_job(job)()


def test_states_that_are_over():
    assert not JobState(state="RUNNING").over
    assert not JobState(state="COMPLETING").over
    assert JobState(state="NODE_FAIL").over


@pytest.mark.parametrize("program", ["squeue", "sacct"])
@pytest.mark.parametrize("banner", ["Slurm is being upgraded, come back later", "|||", "12||x"])
def test_what_is_no_job_is_no_answer(slurm, tmp_path, program, banner, caplog):
    """Else a job that runs would count as forgotten, and a second one could be submitted into its folder."""
    submitted(tmp_path / "runs" / "first")
    fake = slurm.folder / "bin" / program
    fake.write_text(f"#!/bin/sh\necho '{banner}'\n")
    answers = Slurm()
    (row,) = rows_of(find_runs(), answers)
    assert row.state.state == ("UNKNOWN" if program == "squeue" else "ENDED")
    assert f"{program} printed what is no job: '" in caplog.text


def test_a_job_of_another_cluster_is_not_asked_for_under_its_number(slurm, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_CLUSTERS", "far")
    submitted(tmp_path / "runs" / "first")
    slurm.answer(jobs={"12": {"State": "RUNNING"}})
    (row,) = rows_of(find_runs(), Slurm())
    assert row.state.state == "RUNNING"
    monkeypatch.delenv("SLURM_CLUSTERS")
    (row,) = rows_of(find_runs(), Slurm())
    assert (row.state.state, row.state.over) == ("UNKNOWN", False)
    assert "job 12 is another cluster's; to see it: export SLURM_CLUSTERS=far" in caplog.text
    with pytest.raises(OIALRError, match="First: export SLURM_CLUSTERS=far"):
        cancel("runs/first")
    assert [call for call in slurm.calls if call[0] == "scancel"] == []
