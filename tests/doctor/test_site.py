"""Site files are sourced before anything is looked at."""

from __future__ import annotations

from pathlib import Path

import pytest

import hpc_oialr
from hpc_oialr.doctor.context import CheckContext
from hpc_oialr.errors import UnknownNameError

SITE = """
SITE_SBATCH=(--partition="${OIALR_PARTITION:-accelerated}" --account=chemistry --gres=gpu:4)
SITE_MPI=pmix
echo loading
export NCCL_SOCKET_IFNAME='ib 9' TWO='a
b=c'
: "${OIALR_RUNS:=/scratch/runs}"
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OIALR_PARTITION", "OIALR_RUNS", "SBATCH_PARTITION", "SBATCH_ACCOUNT", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def write(tmp_path: Path, script: str) -> str:
    (tmp_path / "site.sh").write_text(script)
    return str(tmp_path / "site.sh")


def test_variables_of_a_site_count(tmp_path: Path) -> None:
    around, findings = CheckContext.at_site(write(tmp_path, SITE))
    assert [(found.name, found.state) for found in findings] == [("site", "ok")]
    assert around.partition == "accelerated"
    assert around.folder == Path("/scratch/runs")
    assert around.environ["TWO"] == "a\nb=c"
    assert around.environ["SITE_MPI"] == "pmix"
    assert around.environ["NCCL_SOCKET_IFNAME"] == "ib 9"


def test_sites_of_this_repository_run_on_any_machine() -> None:
    files = list((Path(hpc_oialr.__file__).parent / "launch" / "sites").glob("*.sh"))
    assert files
    for file in files:
        _, (found,) = CheckContext.at_site(file.stem)
        assert found.state == "ok", found


def test_a_site_file_that_fails_in_a_job_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "[[ -n ${SLURM_JOB_ID:-} ]] || return 0\nload_module cuda/99"
    _, (found,) = CheckContext.at_site(write(tmp_path, script))
    assert found.state == "ok"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    _, (found,) = CheckContext.at_site(write(tmp_path, script))
    assert found.state == "problem"
    assert found.found.endswith("load_module: command not found.")


@pytest.mark.parametrize(
    ("script", "reason"),
    [("load_module cuda/99", "load_module: command not found"), ("exit 3", "exit code 3")],
)
def test_a_site_file_that_fails_here(tmp_path: Path, script: str, reason: str) -> None:
    around, (found,) = CheckContext.at_site(write(tmp_path, f"{script}\nexport OIALR_SEEN=1\n"))
    assert (found.name, found.state) == ("site", "problem")
    assert reason in found.found
    assert str(tmp_path / "site.sh") in found.found
    assert found.fix == "module avail   (then correct the site file)"
    assert "OIALR_SEEN" not in around.environ
    assert "PATH" in around.environ


def test_an_unknown_site() -> None:
    with pytest.raises(UnknownNameError, match="unknown site 'atlantis'"):
        CheckContext.at_site("atlantis")


def test_without_a_site_slurms_own_variables_count(monkeypatch: pytest.MonkeyPatch) -> None:
    around, findings = CheckContext.at_site(None)
    assert (around.partition, around.folder, findings) == (None, Path("runs"), [])
    monkeypatch.setenv("SBATCH_PARTITION", "cpu")
    monkeypatch.setenv("SBATCH_ACCOUNT", "physics")
    around, _ = CheckContext.at_site(None)
    assert around.partition == "cpu"
    assert CheckContext.at_site(None, partition="gpu")[0].partition == "gpu"
