"""Runs go to Slurm: the script, the folders, and what is said before anything is submitted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from support.tiny_runs import write_recipe

import hpc_oialr.launch
from hpc_oialr.cli.command_submit import OPTIONS
from hpc_oialr.cli.main import main
from hpc_oialr.errors import ConfigError, MissingExtraError, OIALRError
from hpc_oialr.launch import Request, submit
from hpc_oialr.launch.site import at_site, read_site
from hpc_oialr.record import RunFolder
from hpc_oialr.train.load_config import load_config

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'hpc_oialr[slurm]'")

SCRIPT = """#!/bin/bash

# Parameters
#SBATCH --account=project
#SBATCH --cpus-per-task=8
#SBATCH --error={folder}/submitit/%j_0_log.err
#SBATCH --gpus-per-node=4
#SBATCH --hint=nomultithread
#SBATCH --job-name=first
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output={folder}/submitit/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --requeue
#SBATCH --signal=USR1@60
#SBATCH --time=1-12

# setup
export OIALR_MAX_REQUEUES=5
set -eo pipefail
source {job}
source {site}
module load cuda

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output {folder}/submitit/%j_%t_log.out --error {folder}/submitit/%j_%t_log.err \
--open-mode=append --cpu-bind=cores '--mpi=p x' \
{python} -u -m hpc_oialr.launch.task -u -m submitit.core._submit {folder}/submitit
"""
NASTY = """it's "$(touch broken)" `touch broken` ; touch broken"""


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


def test_script(slurm, recipe, tmp_path):
    site = tmp_path / "site.sh"
    site.write_text(
        "SITE_SBATCH=(--partition=cpu --account project --hint=nomultithread --gres=gpu:2) SITE_MPI='p x'\n"
        "SITE_SRUN=(--cpu-bind=cores)\n[[ -n ${SLURM_JOB_ID:-} ]] || return 0\nmodule() { :; }\n"
    )
    script = submit(
        recipe,
        ["--train.stop_signal", "USR1"],
        dry_run=True,
        folder=tmp_path / "first",
        nodes=2,
        gpus_per_node=4,
        cpus_per_task=8,
        time="1-12",
        partition="gpu",
        signal_s=60,
        max_requeues=5,
        site=str(site),
        setup=["module load cuda"],
    )
    job = Path(hpc_oialr.launch.__file__).with_name("job.sh")
    assert script == SCRIPT.format(folder=tmp_path / "first", python=sys.executable, site=site, job=job)
    assert slurm.calls == []
    assert not (tmp_path / "first").exists()


@pytest.mark.parametrize(
    ("options", "parameters", "expected"),
    [
        ("--gres=gpu:4,tmpfs:1", {}, {"tasks_per_node": 4, "gpus_per_node": None, "gres": "gpu:4,tmpfs:1"}),
        ("--gres=gpu:a100:4", {"tasks_per_node": 1}, {"tasks_per_node": 1, "gres": "gpu:a100:4"}),
        ("--gres=gpu:4,tmpfs:1", {"gpus_per_node": 2}, {"gpus_per_node": 2, "gres": "tmpfs:1"}),
        (
            "--ntasks-per-node=8 --gpus-per-node=8",
            {},
            {"tasks_per_node": 8, "gpus_per_node": 8, "processes": 8},
        ),
        ("--qos regular --exclusive", {"qos": "debug"}, {"qos": "debug", "exclusive": ""}),
    ],
)
def test_what_is_left_open_is_the_sites(tmp_path, options, parameters, expected):
    file = tmp_path / "site.sh"
    file.write_text(f"SITE_SBATCH=({options})\n")
    request, site = at_site(Request(**parameters), read_site(str(file)))
    found = {name: getattr(request, name) if hasattr(request, name) else site.sbatch[name] for name in expected}
    assert found == expected


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "SITE_SBATCH=(-p gpu)",
            "SITE_SBATCH of {} holds '-p'; must hold long options. E.g. --partition=NAME.",
        ),
        ("echo broken >&2; false", "the site file {} does not run here: broken."),
        ("SITE_SBATCH=(--cpus-per-task=many)", "cpus_per_task is 'many' (from {}); must be a whole number"),
    ],
)
def test_what_is_wrong_with_a_site(tmp_path, text, error):
    file = tmp_path / "site.sh"
    file.write_text(text)
    with pytest.raises(OIALRError) as caught:
        at_site(Request(), read_site(str(file)))
    assert error.format(file) in str(caught.value)


@pytest.mark.parametrize("name", ["generic", "horeka", "juwels_booster", "lumi", "perlmutter"])
def test_sites_of_this_project(slurm, recipe, name):
    script = submit(recipe, dry_run=True, site=name)
    assert f"launch/sites/{name}.sh\n" in script


def test_submission(slurm, recipe, tmp_path):
    (job,) = submit(recipe, ["--train.steps", "30"], folder="runs/first", nodes=2, tasks_per_node=2)
    assert (job.job_id, job.num_tasks) == ("12", 4)
    (call,) = slurm.calls
    assert call[0] == "sbatch"
    folder = tmp_path / "runs" / "first"
    assert not RunFolder(folder).holds_run
    for path in (folder, folder / "submitit", folder / "checkpoints"):
        assert path.stat().st_mode & 0o777 == 0o700
    call = job.submission().function
    assert (call.recipe, call.folder, call.settings) == (str(recipe), folder, ("--train.steps", "30"))
    written = json.loads((folder / "job.json").read_text())
    assert {"submitted", "host"} <= set(written)
    assert {key: value for key, value in written.items() if key not in ("submitted", "host")} == {
        "version": 1,
        "job_id": "12",
        "executor": "slurm",
        "recipe": str(recipe),
        "processes": 4,
        "max_requeues": 20,
        "output": "submitit/12_%t_log.%s",
        "clusters": "",
    }


def test_array_has_a_folder_for_each_seed(slurm, recipe, tmp_path):
    jobs = submit(recipe, folder="runs/many", array={"seeds": [3, 5]})
    assert [job.job_id for job in jobs] == ["12_0", "12_1"]
    folder = tmp_path / "runs" / "many"
    for job, seed in zip(jobs, (3, 5), strict=True):
        call = job.submission().function
        assert call.settings == ("--train.seed", str(seed))
        assert call.folder == folder / f"seed_{seed}"
        written = json.loads((call.folder / "job.json").read_text())
        assert (written["job_id"], written["output"]) == (job.job_id, f"../submitit/{job.job_id}_%t_log.%s")
    script = (folder / "submitit" / "12_submission.sh").read_text()
    assert "#SBATCH --array=0-1%2\n" in script
    assert "%A_%a_%t_log.err" in script
    assert script == submit(recipe, dry_run=True, folder="runs/many", array={"seeds": [3, 5]})


def test_names_with_quotes_and_commands_are_only_names(slurm, recipe, tmp_path):
    """The script is run by a real bash; srun and the requeue see what was given, and nothing else happens."""
    slurm.answer(srun_code=75)
    setting = f"{NASTY}\ntouch broken"
    (job,) = submit(recipe, ["--model.dim", setting, "--model.dim", "16"], folder=tmp_path / NASTY, constraint=NASTY)
    script = job.paths.submission_file
    environ = {**os.environ, "SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "3"}
    done = subprocess.run(["bash", str(script)], env=environ, capture_output=True, text=True)
    assert done.returncode == 75
    assert "stopped with a checkpoint; requeue 1 of 20" in done.stderr
    _, srun, *scontrol = slurm.calls
    assert scontrol == [["scontrol", "--oneliner", "show", "job", "12"], ["scontrol", "requeue", "12"]]
    files = tmp_path / NASTY / "submitit"
    assert srun == [
        "srun",
        "--kill-on-bad-exit=1",
        "--wait=60",
        "--unbuffered",
        "--output",
        f"{files}/%j_%t_log.out",
        "--error",
        f"{files}/%j_%t_log.err",
        "--open-mode=append",
        sys.executable,
        "-u",
        "-m",
        "hpc_oialr.launch.task",
        "-u",
        "-m",
        "submitit.core._submit",
        str(files),
    ]
    header = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert len(header) == 10
    assert not list(tmp_path.rglob("broken"))
    assert job.submission().function.settings[1] == setting


@pytest.mark.parametrize(("code", "calls"), [(0, 0), (1, 0), (76, 2)])
def test_the_script_requeues_by_the_code_of_srun(slurm, recipe, code, calls):
    slurm.answer(srun_code=code)
    (job,) = submit(recipe, folder="runs/first")
    environ = {**os.environ, "SLURM_JOB_ID": "12"}
    done = subprocess.run(["bash", str(job.paths.submission_file)], env=environ, capture_output=True, text=True)
    assert done.returncode == code
    assert len([call for call in slurm.calls if call[0] == "scontrol"]) == calls


def test_a_task_of_an_array_requeues_itself_only(slurm, recipe):
    slurm.answer(srun_code=75)
    job, _ = submit(recipe, folder="runs/many", array={"seeds": [0, 1]})
    script = job.paths.submission_file.parent / "12_submission.sh"
    # Slurm gives the array's own number to its last task.
    environ = {**os.environ, "SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1"}
    subprocess.run(["bash", str(script)], env=environ, capture_output=True, check=False)
    assert slurm.calls[-1] == ["scontrol", "requeue", "12_1"]


def test_a_site_file_that_fails_ends_the_job(slurm, recipe, tmp_path):
    site = tmp_path / "bad.sh"
    site.write_text("[[ -n ${SLURM_JOB_ID:-} ]] || return 0\nfalse\n")
    (job,) = submit(recipe, folder="runs/first", site=str(site))
    environ = {**os.environ, "SLURM_JOB_ID": "12"}
    done = subprocess.run(["bash", str(job.paths.submission_file)], env=environ, capture_output=True, text=True)
    assert done.returncode == 1
    assert [call[0] for call in slurm.calls] == ["sbatch"]


@pytest.mark.parametrize(
    ("settings", "parameters", "text"),
    [
        (["--train.stepz", "3"], {}, "Did you mean 'train.steps'?"),
        (
            [],
            {"nodes": 3},
            "train.global_batch is 8 (from tiny.yaml); must be a positive multiple of the world size",
        ),
        (
            ["--train.accumulation", "3"],
            {"nodes": 2},
            "train.accumulation is 3 (from the command line); must divide",
        ),
        (
            ["--engine", "TensorParallel", "--engine.size", "4"],
            {"nodes": 2},
            "engine.size is 4 (from the command",
        ),
        (
            ["--engine", "Single"],
            {"nodes": 2},
            "engine is 'Single' (from the command line); is for one process",
        ),
        ([], {"site": "atlantis"}, "unknown site 'atlantis'; valid: "),
    ],
)
def test_what_would_end_the_job_at_once_is_said_now(slurm, recipe, settings, parameters, text):
    with pytest.raises(OIALRError) as caught:
        submit(recipe, settings, folder="runs/first", **parameters)
    assert text in str(caught.value)
    assert slurm.calls == []
    assert not RunFolder("runs/first").path.exists()


def test_tensor_parallel_processes_share_a_batch(slurm, recipe):
    assert submit(recipe, ["--engine", "TensorParallel", "--train.global_batch", "1"], nodes=2, dry_run=True)


def test_refusal(slurm, recipe, capsys):
    slurm.answer(refuse="invalid partition specified: moon")
    with pytest.raises(OIALRError, match=r"Slurm refused the job: sbatch: error: invalid partition specified: moon"):
        submit(recipe, folder="runs/first", partition="moon")
    assert not RunFolder("runs/first").path.exists()
    assert capsys.readouterr().err == ""


def test_one_job_a_folder(slurm, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("hpc_oialr.record.owner.SILENT_JOB_S", 0.0)
    submit(recipe, folder="runs/first")
    slurm.answer(jobs={"12": {"State": "RUNNING"}})
    with pytest.raises(OIALRError, match=r"job 12 \(running\) works in .*runs/first; one job a folder\..*oialr cancel"):
        submit(recipe, folder="runs/first")
    slurm.answer(jobs={"12": {"State": "FAILED"}})
    submit(recipe, folder="runs/first")
    (tmp_path / "runs" / "first" / "summary.json").write_text("{}")
    with pytest.raises(OIALRError, match=r"runs/first holds a finished run"):
        submit(recipe, folder="runs/first")


def test_a_folder_with_another_run(slurm, recipe, tmp_path):
    RunFolder("runs/first").create().write_config(load_config(recipe, ["--train.steps", "7"]).text)
    with pytest.raises(OIALRError, match=r"runs/first holds a run with other settings: train.steps is 7 there, 24"):
        submit(recipe, folder="runs/first")
    (job,) = submit(recipe, ["--train.steps", "7", "--train.timeout_s", "60"], folder="runs/first")
    assert job.job_id == "12"


def test_submitit_is_missing(slurm, recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(MissingExtraError, match=r"needs submitit. Install it with: pip install 'hpc_oialr\[slurm\]'"):
        submit(recipe, folder="runs/first")


def test_local_executor_sends_one_signal_only(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"train.stop_signal is 'HUP'; must be USR2 with the executor 'local'"):
        submit(recipe, ["--train.stop_signal", "HUP"], folder=tmp_path / "x", executor="local")
    with pytest.raises(ConfigError, match=r"executor is 'local'; has no batch script to look at"):
        submit(recipe, folder=tmp_path / "x", executor="local", dry_run=True)


# -- the command ---------------------------------------------------------------------------------


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_parameter_is_an_option():
    options = {option.removeprefix("--").replace("-", "_") for option, *_ in OPTIONS}
    assert options | {"folder", "setup", "visible_gpus"} == {field.name for field in fields(Request)}


def test_command(slurm, recipe, tmp_path, capsys):
    out = tmp_path / "runs" / "a b"
    code, text, _ = run(capsys, "submit", recipe, "--nodes", 2, "--train.seed", 4, "--out", out, "--array", "seeds=0-1")
    assert (code, text) == (0, f"job 12_0: '{out}/seed_0'\njob 12_1: '{out}/seed_1'\n")


def test_dry_run_asks_slurm(slurm, recipe, tmp_path, capsys):
    code, text, _ = run(capsys, "submit", recipe, "--dry-run", "--out", tmp_path / "x")
    assert code == 0
    assert text.startswith("#!/bin/bash\n")
    assert text.rstrip().endswith(
        "# sbatch: Job 5 to start at 2026-01-01T10:00:00 on nodes node[1-2] in partition main"
    )
    assert slurm.calls == [["sbatch", "--test-only"]]
    slurm.answer(refuse="invalid account")
    code, text, _ = run(capsys, "submit", recipe, "--dry-run", "--out", tmp_path / "x")
    assert code == 1
    assert text.rstrip().endswith("# sbatch --test-only: sbatch: error: invalid account")


def test_dry_run_without_slurm(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, text, _ = run(capsys, "submit", recipe, "--dry-run", "--out", tmp_path / "x")
    assert code == 0
    assert text.rstrip().endswith("# sbatch --test-only: there is no sbatch here")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--node", "3"], "unknown option or setting '--node' (from the command line); valid: --account"),
        (["--time", "4h"], "time is '4h' (from the command line); must be minutes"),
        (["--array", "seeds=a"], "array is 'seeds=a' (from the command line); must be seeds=LIST"),
        (["--train.stepz", "3"], "unknown setting 'train.stepz'"),
    ],
)
def test_wrong_options_are_one_line(slurm, recipe, capsys, arguments, text):
    code, out, err = run(capsys, "submit", recipe, *arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert err.count("\n") == 1
