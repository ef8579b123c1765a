"""The batch scripts with Slurm's programs replaced: what they call, with which words, and what they do at the end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support.fake_slurm import FakeSlurm
from support.mpirun import HERE

from benchmarks.slurm_cluster import scripts
from hpc_oialr.train.load_config import load_config

NASTY = """it's "$(touch broken)" `touch broken` ; touch broken & | *"""
OIALR = ["python", "-m", "hpc_oialr"]
SRUN = ["srun", "--kill-on-bad-exit=1", "--wait=60"]
JOB = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2", "SLURM_SUBMIT_DIR": str(HERE)}
NAMES = [path.stem for path in scripts()]


class Shell:
    """Runs a script as Slurm would, in a folder of its own."""

    def __init__(self, folder: Path, slurm: FakeSlurm) -> None:
        self.folder, self.slurm = folder, slurm
        # Outside of an image the host may have no Python at all, or one that is too old.
        _program(slurm.folder / "bin" / "python3", "exit 1")
        _program(slurm.folder / "bin" / "python", 'printf "%s\\n" "$@" >> python.txt')

    def start(self, script: str | Path, *words: str, **extra: str) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OIALR_"))}
        environment = kept | {"OIALR_VENV": str(self.folder / "none")} | extra
        path = script if isinstance(script, Path) else HERE / "slurm" / f"{script}.sh"
        return subprocess.Popen(
            ["bash", str(path), *words],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str | Path, *words: str, code: int = 0, **extra: str) -> str:
        """Its standard error."""
        process = self.start(script, *words, **extra)
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        assert not list(self.folder.rglob("broken"))
        return said

    def called(self, program: str) -> list[str]:
        """The one call of a program."""
        (call,) = [call for call in self.slurm.calls if call[0] == program]
        return call

    @property
    def requeued(self) -> bool:
        return ["scontrol", "requeue", "12"] in self.slurm.calls


def _program(path: Path, line: str) -> None:
    path.write_text(f"#!/bin/bash\n{line}\n")
    path.chmod(0o755)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    folder = tmp_path / "work"
    folder.mkdir()
    return Shell(folder, FakeSlurm(tmp_path / "slurm", monkeypatch))


def test_a_job(shell: Shell) -> None:
    shell.run("vit_b16", "--data.path", NASTY, **JOB, SLURM_CPUS_PER_TASK="8")
    train = ["train", "vit_b16", "--out", "runs/vit_b16-12", "--continue", "--data.path", NASTY]
    assert shell.called("srun") == [*SRUN, "--cpus-per-task=8", *OIALR, *train]
    assert not shell.requeued


def test_variables_of_the_processes(shell: Shell) -> None:
    names = ["SRUN_CPUS_PER_TASK", "OMP_NUM_THREADS", "HDF5_USE_FILE_LOCKING", "PYTHONPATH"]
    values = " ".join(f"${name}" for name in names)
    _program(shell.slurm.folder / "bin" / "srun", f'echo "{values}" > said')
    shell.run("text_gpt", **JOB, SLURM_CPUS_PER_TASK="8", PYTHONPATH="", OMP_NUM_THREADS="")
    assert (shell.folder / "said").read_text().split() == ["8", "8", "FALSE", str(HERE)]


def test_options_of_a_run(shell: Shell) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2"}
    shell.run("vit_b16", **JOB, **array, VARIANT="dense", OIALR_MPI="pmix", OIALR_RUNS="/scratch/my runs")
    folder = "/scratch/my runs/vit_b16-dense-10_2"
    train = ["train", "vit_b16", "--out", folder, "--continue", "--dense", "--train.seed", "2"]
    assert shell.called("srun") == [*SRUN, "--mpi=pmix", *OIALR, *train]


def test_the_published_variant(shell: Shell) -> None:
    shell.run("vit_b16", **JOB, VARIANT="paper")
    train = ["train", "vit_b16", "--out", "runs/vit_b16-paper-12", "--continue", "--paper"]
    assert shell.called("srun") == [*SRUN, *OIALR, *train]
    said = shell.run("vit_b16", code=2, **JOB, VARIANT="papers")
    assert "VARIANT is 'papers'; must be dense or paper" in said


def test_a_folder_and_an_image_of_ones_own(shell: Shell) -> None:
    shell.run("vit_b16", **JOB, OIALR_OUT=NASTY, OIALR_IMAGE="my image.sif")
    image = ["apptainer", "exec", "--nv", "--bind", f"{HERE},{shell.folder}", "my image.sif"]
    train = ["train", "vit_b16", "--out", NASTY, "--continue"]
    assert shell.called("srun") == [*SRUN, *image, *OIALR, *train]


@pytest.mark.parametrize("found_by", ["where it was submitted", "the command", "the command in a path with blanks"])
def test_from_slurms_spool(shell: Shell, tmp_path: Path, found_by: str) -> None:
    root = tmp_path / "my slurm" / "project" if "blanks" in found_by else HERE
    if root != HERE:
        root.mkdir(parents=True)
        for name in ("slurm", "env", "hpc_oialr"):
            (root / name).symlink_to(HERE / name)
    spool = tmp_path / "job00012"
    spool.mkdir()
    shutil.copy(HERE / "slurm" / "text_gpt.sh", spool / "slurm_script")
    known = {"SLURM_SUBMIT_DIR": str(HERE if "where" in found_by else shell.folder)}
    if "command" in found_by:
        shell.slurm.answer(show=f"JobId=12\n   Command={root}/slurm/text_gpt.sh --data.path /a/slurm/b\n   WorkDir=/")
    shell.run(spool / "slurm_script", **JOB | known)
    assert shell.called("srun")[3:6] == OIALR


def test_it_submits_itself(shell: Shell, tmp_path: Path) -> None:
    site = tmp_path / "my site.sh"
    site.write_text("SITE_SBATCH=(--partition=gpu '--comment=a b')\n")
    shell.run("vit_b16", "--nodes=4", "--", "--train.epochs", "30", SITE=str(site))
    ours = ["--nodes=4", str(HERE / "slurm" / "vit_b16.sh"), "--train.epochs", "30"]
    assert shell.called("sbatch") == ["sbatch", "--export=ALL", "--partition=gpu", "--comment=a b", *ours]


@pytest.mark.parametrize("site", ["generic", "horeka", "juwels_booster", "perlmutter", "lumi"])
def test_sites(shell: Shell, site: str) -> None:
    shell.slurm.answer(show="")
    shell.run("vit_b16", SITE=site)
    shell.run("vit_b16", **JOB, SITE=site, SLURM_JOB_NODELIST="a[1-2]", USER="me", OIALR_MODULES="")
    assert shell.called("sbatch")[1] == "--export=ALL"
    assert ("--constraint=gpu" in shell.called("sbatch")) == (site == "perlmutter")
    assert [*OIALR, "train", "vit_b16"] == shell.called("srun")[shell.called("srun").index("python") :][:5]


def test_a_site_that_is_none(shell: Shell) -> None:
    said = shell.run("vit_b16", code=2, **JOB, SITE="horika")
    assert "SITE is 'horika', but there is no " in said
    assert "there are: generic.sh horeka.sh juwels_booster.sh lumi.sh perlmutter.sh" in said


@pytest.mark.parametrize("code", [0, 1, 2, 75, 76, 137])
def test_its_end(shell: Shell, code: int) -> None:
    shell.slurm.answer(srun_code=code)
    said = shell.run("vit_b16", code=code, **JOB)
    assert shell.requeued == (code >= 75)
    assert ("requeue 1 of 20" in said) == shell.requeued


def test_the_last_requeue(shell: Shell) -> None:
    shell.slurm.answer(srun_code=75)
    said = shell.run("vit_b16", code=75, **JOB, SLURM_RESTART_COUNT="3", OIALR_MAX_REQUEUES="3")
    assert not shell.requeued
    assert "job 12 was requeued 3 times, of 3. To continue: submit the same command" in said


@pytest.mark.parametrize(("reason", "requeued"), [("None", False), ("TimeLimit", True)])
def test_slurm_ends_the_job(shell: Shell, reason: str, requeued: bool) -> None:
    """The shell gets TERM with the processes: it waits for them, and knows what became of them."""
    shell.slurm.answer(show=f"JobId=12 JobState=COMPLETING Reason={reason}")
    _program(shell.slurm.folder / "bin" / "srun", "touch runs.txt; sleep 0.5; exit 75")
    process = shell.start("vit_b16", **JOB)
    while not (shell.folder / "runs.txt").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert shell.requeued == requeued
    assert ("Slurm ends job 12 itself, nothing to do" in said) != requeued


@pytest.mark.parametrize("name", ["USR2", "USR1", "HUP"])
def test_a_signal_to_the_shell_alone_reaches_the_run(shell: Shell, name: str) -> None:
    """--signal=B:USR2@120, scancel --batch: the run writes its checkpoint, and the job is requeued."""
    # srun itself kills its tasks upon HUP.
    handed_on = "USR2" if name == "HUP" else name
    line = f"trap 'echo got {handed_on}; exit 75' {handed_on}; touch runs.txt; while :; do sleep 0.05; done"
    _program(shell.slurm.folder / "bin" / "srun", line)
    process = shell.start("vit_b16", **JOB)
    while not (shell.folder / "runs.txt").exists():
        time.sleep(0.01)
    process.send_signal(signal.Signals[f"SIG{name}"])
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, f"got {handed_on}\n"), said
    assert shell.requeued


@pytest.mark.parametrize("name", NAMES)
def test_smoke_settings_are_a_recipes(shell: Shell, name: str) -> None:
    shell.run(name, **JOB, OIALR_SMOKE="1")
    call = shell.called("srun")
    assert call[3:5] == ["--ntasks=2", "--ntasks-per-node=1"]
    recipe, *words = call[call.index("train") + 1 :]
    config = load_config(recipe, words[words.index("--continue") + 1 :]).config
    assert (config.train.device, config.train.steps) == ("cpu", 4)
    assert config.train.global_batch % 4 == 0
    made = shell.folder / "python.txt"
    if made.exists():
        assert made.read_text().split() == [
            *OIALR[1:],
            "data",
            "sample",
            made.read_text().split()[4],
            "runs/samples-12",
        ]
        assert any("runs/samples-12" in word for word in words)


@pytest.mark.parametrize("path", scripts(), ids=NAMES)
def test_headers(path: Path) -> None:
    """All that a job needs to be stopped in time and go on; short enough to be read."""
    text = path.read_text()
    for option in (
        "--signal=USR2@120",
        "--requeue",
        "--open-mode=append",
        "--time=",
        f"--job-name={path.stem}",
    ):
        assert f"#SBATCH {option}" in text
    assert ("--gpus-per-node=4" in text) == (path.stem != "fashion_mnist")
    assert "--gpus-per-task" not in text
    assert len(text.splitlines()) < 30


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    files = [
        str(path)
        for folder in ("slurm", "env", "hpc_oialr/launch/sites", "hpc_oialr/launch")
        for path in sorted((HERE / folder).glob("*.sh"))
    ]
    assert len(files) >= 15
    done = subprocess.run(["shellcheck", *files], cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
