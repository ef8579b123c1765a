"""Unfit nodes are found before a run begins, and named."""

from __future__ import annotations

import pytest
import torch
from support.spawn import spawn

from hpc_oialr.distributed import World
from hpc_oialr.distributed.health import (
    NodeInfo,
    check_devices,
    check_health,
    check_sums,
    check_versions,
    node_info,
)
from hpc_oialr.errors import HealthError

VERSIONS = {"torch": "2.13", "settings": "abc"}


def crew(**of_process_2: object) -> list[NodeInfo]:
    """Four processes on two nodes; the third one differs."""
    usual = {"fault": "", "device": "", "versions": VERSIONS}
    everyone = [NodeInfo(node=f"a{rank // 2 + 1}", **usual) for rank in range(4)]
    everyone[2] = NodeInfo(**{"node": "a2", **usual, **of_process_2})
    return everyone


def test_this_process_is_fit():
    check_health(World.single("cpu"), "abc")
    mine = node_info(World.single("cpu"), "abc")
    assert (mine.fault, mine.device, mine.versions["torch"]) == ("", "", torch.__version__)


def unlike(rank: int, size: int) -> str:
    world = World.from_environment(device="cpu", timeout_s=60)
    check_health(world, "the same")
    with pytest.raises(HealthError) as caught:
        check_health(world, f"of process {rank}")
    return str(caught.value)


def test_processes_with_other_settings_all_learn_of_it() -> None:
    first, second = spawn(unlike, 2)
    assert first == second
    assert first.startswith("rank 1 of 2 on node ")
    assert " has settings of process 1, most have of process 0; all must be the same. " in first


def test_a_device_that_does_not_compute():
    check_devices(crew())
    with pytest.raises(HealthError) as caught:
        check_devices(crew(fault="CUDA error: uncorrectable ECC error encountered"))
    assert str(caught.value) == (
        "rank 2 of 4 on node a2 cannot compute on its device (CUDA error: uncorrectable ECC error encountered); "
        "every rank must. To leave out what is unfit: sbatch --exclude=a2. To start without this check: "
        "--train.health_check false"
    )


def test_a_device_that_is_not_there():
    fault = node_info(World(device=torch.device("meta")), "abc").fault
    assert "meta tensors" in fault
    assert "\n" not in fault


def test_two_processes_on_one_gpu():
    check_devices([NodeInfo("a1", "", "GPU x", {}), NodeInfo("a2", "", "GPU x", {}), NodeInfo("a1", "", "GPU y", {})])
    with pytest.raises(HealthError, match=r"ranks 0 and 2 on node a1 both compute on GPU x; .*--gpus-per-node"):
        check_devices(
            [
                NodeInfo("a1", "", "GPU x", {}),
                NodeInfo("a2", "", "GPU x", {}),
                NodeInfo("a1", "", "GPU x", {}),
            ]
        )


@pytest.mark.parametrize("name", VERSIONS)
def test_a_node_with_something_else(name):
    check_versions(crew())
    with pytest.raises(HealthError, match=rf"2 of 4 on node a2 has {name} old, most have .*; .* --exclude=a2\."):
        check_versions(crew(versions=VERSIONS | {name: "old"}))


def test_a_wrong_sum():
    nodes = ["a1", "a1", "a2", "a3"]
    check_sums(nodes, [(10.0, 10.0)] * 4)
    with pytest.raises(
        HealthError,
        match=r"rank 2 of 4 on node a2 was given 10 to 11 as the sum over all ranks, which is 10 "
        r"\(1 more ranks like it\)\. .*--exclude=a2,a3\.",
    ):
        check_sums(nodes, [(10.0, 10.0), (10.0, 10.0), (10.0, 11.0), (0.0, 0.0)])
