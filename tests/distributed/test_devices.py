"""Which GPU a process gets, without any GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hpc_oialr.distributed.world import choose_device
from hpc_oialr.errors import WorldError


@pytest.fixture
def visible_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("local_rank", "local_size", "visible", "of_node", "index"),
    [(0, 1, 1, None, 0), (3, 4, 4, 4, 3), (3, 4, 1, 4, 0), (3, 4, 1, None, 0), (1, 2, 8, None, 1)],
)
def test_one_visible_and_all_visible(
    visible_gpus: Callable[[int], None],
    local_rank: int,
    local_size: int,
    visible: int,
    of_node: int | None,
    index: int,
) -> None:
    visible_gpus(visible)
    assert choose_device(None, local_rank, local_size, of_node) == torch.device("cuda", index)


def test_more_processes_than_gpus(visible_gpus: Callable[[int], None]) -> None:
    visible_gpus(2)
    with pytest.raises(WorldError, match=r"local rank 2 of 4 has no GPU: 2 are visible.*--gpus-per-node"):
        choose_device("cuda", 2, 4, None)
    visible_gpus(1)
    with pytest.raises(WorldError, match=r"4 ranks share a node .* has 1 GPUs.*--ntasks-per-node"):
        choose_device("cuda", 0, 4, 1)


def test_the_cpu() -> None:
    assert choose_device("cpu", 1, 2, None) == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cpu:0", "meta", ""])
def test_unknown_devices(name: str) -> None:
    with pytest.raises(WorldError, match=r"device is .*must be 'cpu', 'cuda' or 'cuda:INDEX'"):
        choose_device(name, 0, 1, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(WorldError, match=r"device is 'cuda' but torch .* sees no GPU"):
        choose_device("cuda", 0, 1, None)


def test_an_index_is_for_one_process_only(visible_gpus: Callable[[int], None]) -> None:
    visible_gpus(4)
    assert choose_device("cuda:2", 0, 1, None) == torch.device("cuda", 2)
    with pytest.raises(WorldError, match=r"device is 'cuda:2' with 4 ranks.*Use 'cuda'"):
        choose_device("cuda:2", 0, 4, None)
