"""GPUs that are asked for and not there, or not fit; no GPU is needed for that."""

from __future__ import annotations

from importlib import metadata

import pytest
from support.slurm_step import step

from hpc_oialr.commands import Answer
from hpc_oialr.doctor import CheckContext, gpu

DONE = Answer(code=0)
ASKED = {"SLURM_GPUS_PER_NODE": "a100:4", "SLURMD_NODENAME": "node1"}
SEEN = {
    "driver_cuda": 12080,
    "torch": "2.13.0+cu126",
    "torch_cuda": "12.6",
    "error": "",
    "names": ["NVIDIA A100"] * 4,
    "index": 0,
    "free": 79 * 2**30,
    "total": 80 * 2**30,
    "right": True,
    "others": 3,
    "peers": 3,
    "nccl": "2.27",
    "reduced": True,
}


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """There is a driver, or is not."""

    def there(yes: bool) -> None:
        monkeypatch.setattr(gpu, "NVIDIA", tmp_path if yes else tmp_path / "none")
        monkeypatch.setattr(gpu, "AMD", tmp_path / "none")

    return there


@pytest.fixture
def look(context, driver, monkeypatch):
    """Findings for what the probe reports and how it ended."""

    def find(report, answer=DONE, environ=ASKED):
        driver(True)
        monkeypatch.setattr(metadata, "version", lambda name: SEEN["torch"])
        monkeypatch.setattr(CheckContext, "probe", lambda *_, **__: (report, answer))
        return gpu.check_gpus(context(environ))

    return find


def test_a_machine_without_gpus(context, driver):
    driver(False)
    assert [finding.state for finding in gpu.check_gpus(context())] == ["ok"]
    assert [finding.state for finding in gpu.check_gpus(context({"CUDA_VISIBLE_DEVICES": "-1"}))] == ["ok"]


@pytest.mark.parametrize("variable", ["SLURM_GPUS_PER_NODE", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES"])
def test_gpus_are_asked_for_and_there_are_none(context, driver, variable):
    driver(False)
    (found,) = gpu.check_gpus(context({variable: "1", "SLURMD_NODENAME": "node1"}))
    assert (found.state, found.found) == (
        "problem",
        "the job has GPUs by its variables, but node1 has no GPU driver",
    )
    assert found.fix.startswith("srun --gpus-per-node=N")


def test_torch_for_cpus_on_a_machine_with_gpus(context, driver, monkeypatch):
    driver(True)
    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0+cpu")
    (asked,), (found,) = gpu.check_gpus(context(ASKED)), gpu.check_gpus(context())
    assert (asked.state, found.state) == ("problem", "note")
    assert asked.found == "there is a GPU, but torch 2.13.0+cpu is built for CPUs"
    assert asked.fix == "see https://pytorch.org/get-started/locally for a build with CUDA"


def test_a_healthy_node(look):
    assert [(finding.name, finding.state) for finding in look(SEEN)] == [
        ("GPU", "ok"),
        ("own GPU", "ok"),
        ("NCCL", "ok"),
    ]


FAULTS = {
    "driver hangs": (
        {"driver_cuda": 12080},
        Answer(trouble="hung"),
        ("GPU", "CUDA does not start: no answer in time", "--exclude=node1"),
    ),
    "old driver": (
        SEEN | {"names": [], "torch_cuda": "13.0", "driver_cuda": 12020},
        Answer(code=0),
        ("GPU", "is built for CUDA 13.0, the driver supports 12.2 at most", "a build with CUDA 12"),
    ),
    "none visible": (
        SEEN | {"names": [], "error": "No CUDA GPUs are available"},
        Answer(code=0),
        ("GPU", "sees no GPU: No CUDA GPUs are available", "srun --gpus-per-node=N"),
    ),
    "wrong sum": (
        SEEN | {"right": False},
        Answer(code=0),
        ("own GPU", "GPU 0 computes wrong or not at all", "sbatch --exclude=node1"),
    ),
    "no NCCL": (SEEN | {"nccl": None}, Answer(code=0), ("NCCL", "built without it", "a build with NCCL")),
    "NCCL fails": (
        {name: value for name, value in SEEN.items() if name not in ("nccl", "reduced")},
        Answer(stderr="ncclSystemError", code=1),
        ("NCCL", "an all-reduce fails: ncclSystemError", "NCCL_DEBUG=INFO"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(look, fault):
    report, answer, (name, found, fix) = FAULTS[fault]
    (problem,) = [each for each in look(report, answer) if each.state == "problem"]
    assert problem.name == name
    assert found in problem.found
    assert fix in problem.fix


def test_processes_that_would_share_a_gpu(look):
    environ = ASKED | step() | {"SLURM_GPUS_PER_NODE": "2"}
    own = look(SEEN | {"names": ["NVIDIA A100"] * 2}, environ=environ)[1]
    assert (own.state, own.found) == ("problem", "4 ranks share 2 GPUs of node1")
    assert own.fix == "srun --gpus-per-node=4 --ntasks-per-node=4"
    alone = look(SEEN | {"names": ["NVIDIA A100"]}, environ=ASKED | step())[1]
    assert alone.state == "ok", "each process may see its own only"


def test_a_gpu_that_others_use(look):
    _, own, _ = look(SEEN | {"free": 10 * 2**30})
    assert (own.state, own.found) == ("note", "70 of 80 GiB of GPU 0 are taken by other programs")
