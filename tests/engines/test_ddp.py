"""Gradients are averaged once, of what is trained and nothing else, also after parameters were replaced."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.spawn import spawn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hpc_oialr.distributed import World
from hpc_oialr.engines import DDPEngine, adopt, make_engine
from hpc_oialr.engines.ddp import bucket_mb


class Net(nn.Module):
    """A scaled product, so that gradients depend on the process's input, and a batch norm's buffers."""

    def __init__(self, r: int = 4) -> None:
        super().__init__()
        self.inner = nn.Parameter(torch.ones(r))
        self.outer = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(1000), requires_grad=False)
        self.norm = nn.BatchNorm1d(3, affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled = x * self.inner.sum() * self.outer * self.frozen[0]
        self.norm(scaled.detach())
        return scaled.sum()


def batch(rank: int) -> torch.Tensor:
    return torch.arange(6.0).view(2, 3) * (rank + 1)


def expected(net: Net, size: int) -> list[torch.Tensor]:
    """Mean of the processes' gradients, from a copy of the module on one process."""
    copy = Net(len(net.inner))
    copy.load_state_dict(net.state_dict())
    total = sum(copy(batch(rank)) for rank in range(size)) / size
    return list(torch.autograd.grad(total, [copy.inner, copy.outer]))


def backward(model: nn.Module, rank: int) -> None:
    model.zero_grad()
    model(batch(rank)).backward()


def check(model: nn.Module, net: Net, rank: int, size: int) -> None:
    backward(model, rank)
    for parameter, gradient in zip((net.inner, net.outer), expected(net, size), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=0)
    assert net.frozen.grad is None


def shrink(net: Net, r: int) -> None:
    net.inner = nn.Parameter(torch.ones(r))


# Without annotations: DDP compares them with its own types, and here they would be strings.
def counting_hook(sizes, bucket):
    sizes.append(bucket.buffer().numel())
    reduced = dist.all_reduce(bucket.buffer() / dist.get_world_size(), async_op=True)
    return reduced.get_future().then(lambda future: future.value()[0])


def replace_and_rewrap(rank: int, size: int, views: bool) -> None:
    world = World.from_environment(timeout_s=60)
    engine = make_engine(world, gradient_as_bucket_view=views)
    net = Net()
    nn.init.constant_(net.outer, float(rank + 1))
    model = engine.wrap(net)
    assert net.outer.tolist() == [1.0] * 3, "process 0's values are sent first"
    check(model, net, rank, size)
    for r in (3, 2):
        shrink(net, r)
        model = engine.rewrap(net)
        check(model, net, rank, size)
        check(model, net, rank, size)
    accumulate(engine, model, net, rank, size)


def accumulate(engine: Any, model: nn.Module, net: Net, rank: int, size: int) -> None:
    model.zero_grad()
    with engine.no_sync(model):
        model(batch(rank)).backward()
        local = net.outer.grad.clone()
    model(batch(rank)).backward()
    torch.testing.assert_close(net.outer.grad, 2 * expected(net, size)[1], rtol=1e-6, atol=0)
    assert not torch.equal(local, expected(net, size)[1])


@pytest.mark.parametrize("views", [True, False])
def test_replaced_parameters_are_averaged_once(views: bool) -> None:
    spawn(replace_and_rewrap, 2, views)


def count_traffic(rank: int, size: int) -> tuple[list[int], bool]:
    engine = DDPEngine(World.from_environment(timeout_s=60))
    net, sizes = Net(), []
    model = engine.wrap(net)
    assert isinstance(model, DistributedDataParallel)
    model.register_comm_hook(sizes, counting_hook)
    old = weakref.ref(model.reducer)
    del model
    for r in (4, 2):
        shrink(net, r)
        check(engine.rewrap(net), net, rank, size)
    net.outer.requires_grad_(False)
    backward(engine.rewrap(net), rank)
    gc.collect()
    return sizes, old() is None


def test_only_what_is_trained_is_sent_and_old_reducers_are_freed() -> None:
    for sizes, freed in spawn(count_traffic, 2):
        # DDP's first pass over a new wrapper is in one bucket: 4 + 3 values, 2 + 3, then 2.
        assert sizes == [7, 5, 2]
        assert freed


def nothing_trained(rank: int, size: int) -> list[float]:
    engine, net = make_engine(World.from_environment(timeout_s=60)), Net().requires_grad_(False)
    nn.init.constant_(net.outer, float(rank + 1))
    net.norm.running_mean.fill_(float(rank))
    assert engine.wrap(net) is net
    net.requires_grad_(True)
    assert isinstance(engine.rewrap(net), DistributedDataParallel)
    net.requires_grad_(False)
    assert engine.rewrap(net) is net
    return [net.outer[0].item(), net.norm.running_mean[0].item()]


def test_a_module_that_trains_nothing_is_sent_but_not_wrapped() -> None:
    assert spawn(nothing_trained, 2) == [[1.0, 0.0], [1.0, 0.0]]


def adopted(rank: int, size: int) -> None:
    World.from_environment(timeout_s=60)
    group, net, sizes = dist.new_group(list(range(size))), Net(), []
    users = DistributedDataParallel(net, process_group=group, bucket_cap_mb=3, find_unused_parameters=True)
    users.broadcast_buffers = False
    users.register_comm_hook(sizes, counting_hook)
    default = DistributedDataParallel(Net())
    assert adopt(default)[0].rewrap(default.module).bucket_bytes_cap == 1024**2, "not set by its user"
    engine, inner = adopt(users)
    assert inner is net
    assert engine.wrap(inner) is users
    assert (engine.world.rank, engine.world.size, engine.world.group) == (rank, size, group)
    shrink(net, 2)
    model = engine.rewrap(inner)
    assert model is users, "whoever calls it goes on calling it"
    assert model.process_group is group
    assert model.find_unused_parameters
    assert not model.broadcast_buffers
    assert model.bucket_bytes_cap == 3 * 1024**2
    check(model, net, rank, size)
    assert sizes == [5], "the user's hook is called once"
    engine, plain = adopt(net)
    assert isinstance(engine, DDPEngine)
    assert plain is net


def test_a_users_wrapper_is_adopted_with_its_options() -> None:
    spawn(adopted, 2)


def overlapping(rank: int, size: int) -> tuple[list[float], list[int]]:
    engine, sizes = DDPEngine(World.from_environment(timeout_s=60)), []
    net = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(40)))
    wrapped = engine.wrap(net)
    wrapped.register_comm_hook(sizes, counting_hook)
    caps = [wrapped.bucket_bytes_cap / 1024**2]
    for layer in net[:20]:
        layer.requires_grad_(False)
    model = engine.rewrap(net)
    caps.append(model.bucket_bytes_cap / 1024**2)
    for _ in range(2):
        del sizes[:]
        model(torch.ones(1, 512)).sum().backward()
    return caps, sizes


def test_buckets_shrink_with_what_is_trained() -> None:
    """40 MiB are trained, then 20: eighths of them, whole layers of 1 MiB each."""
    for caps, sizes in spawn(overlapping, 2):
        assert caps == [5.0, 2.5]
        assert sizes == [3 * 512**2] * 6 + [2 * 512**2], "a bucket is full once it has reached its size"


def test_a_bucket_is_never_larger_than_torchs_nor_smaller_than_torchs_first() -> None:
    assert bucket_mb(10e9) == 25.0
    assert bucket_mb(8 * 2**20 - 8) == bucket_mb(100) == 1.0
    assert bucket_mb(24 * 2**20) == 3.0


def buffers(rank: int, size: int) -> tuple[list[float], list[float]]:
    net = Net()
    engine = make_engine(World.from_environment(timeout_s=60))
    model = engine.wrap(net)
    for r in (3, 2):
        backward(model, rank)
        shrink(net, r)
        model = engine.rewrap(net)
    own = net.norm.running_mean.tolist()
    model.eval()
    model(batch(rank))
    return own, net.norm.running_mean.tolist()


def test_buffers_begin_every_pass_as_process_0s() -> None:
    (first_own, first), (second_own, second) = spawn(buffers, 2)
    alone = Net()
    for r in (3, 2):
        alone(batch(0))
        shrink(alone, r)
    assert first == second == first_own == alone.norm.running_mean.tolist()
    assert second_own != first_own
