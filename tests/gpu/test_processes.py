"""A process group of one: NCCL on a GPU, gloo on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from support.gpu_loop import OPTIMIZERS, batch, make, network, no_synchronisation, one_step, settings, train
from torch.nn.parallel import DistributedDataParallel

from hpc_oialr import OIALR, merge
from hpc_oialr.distributed import World

pytestmark = pytest.mark.gpu


@pytest.fixture
def group(device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_wrapper_that_is_renewed_trains_like_none(optimizer: str, device: torch.device) -> None:
    expected = train(make(device, optimizer), 8)
    ids = [device.index or 0] if device.type == "cuda" else None
    wrapped = DistributedDataParallel(network(device), device_ids=ids, gradient_as_bucket_view=True)
    oialr = OIALR(wrapped, OPTIMIZERS[optimizer](wrapped), settings())
    assert isinstance(oialr.model, DistributedDataParallel)
    losses = train(oialr, 8)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert isinstance(oialr.model, DistributedDataParallel)
    assert oialr.r == {"layers.0": 16, "layers.1": 32, "layers.2": 16}
    assert not any("U" in name.split(".") for name, _ in merge(oialr.module).named_parameters())


@pytest.mark.usefixtures("group")
def test_a_step_of_a_renewed_wrapper_never_waits_for_the_host(device: torch.device) -> None:
    model = DistributedDataParallel(network(device))
    oialr = OIALR(model, OPTIMIZERS["MuonAdamW"](model), settings(frequency=100))
    train(oialr, 6)
    x, y = batch(device)
    with no_synchronisation(device):
        loss = one_step(oialr, x, y, clip=1.0)[0]
    assert torch.isfinite(loss)
    assert oialr.r == {"layers.0": 32, "layers.1": 64, "layers.2": 32}


@pytest.mark.usefixtures("group")
def test_collectives_of_a_group_of_one(device: torch.device) -> None:
    world = World.current()
    assert (world.rank, world.size, world.device.type) == (0, 1, device.type)
    tensor = torch.arange(4.0, device=device)
    pending = world.start_all_reduce(tensor)
    if pending is not None:
        pending.wait()
    assert tensor.tolist() == [0.0, 1.0, 2.0, 3.0]
    assert world.all_gather_object({"r": 8}) == [{"r": 8}]
