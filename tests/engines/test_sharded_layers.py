"""Sharded layers against whole ones, value by value, and what they send, byte by byte."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.spawn import spawn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from hpc_oialr.distributed import World
from hpc_oialr.engines.tensor.collectives import gather_from, scatter_to
from hpc_oialr.engines.tensor.layers import shard_dense, shard_low_rank
from hpc_oialr.lowrank import LowRankWeight, TargetWeight
from hpc_oialr.lowrank.conversion import convert_weight
from hpc_oialr.lowrank.layout import Sharded
from hpc_oialr.lowrank.selection import replaceable

TOLERANCE = 1e-10
TOKENS = 6
# Even on 2 and 4 processes; uneven; fewer columns than processes.
WIDTHS = [(8, 12), (7, 10), (5, 3)]


def layout_of(size: int) -> Sharded:
    World.from_environment(device="cpu")
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("data", "tensor"))
    return Sharded(mesh, split_cores=False, even_columns=False)


def target_of(layer: nn.Module) -> TargetWeight:
    targets, left = replaceable(nn.Sequential(layer))
    assert not left
    return targets[0]


def lower(target: TargetWeight, r: int, layout: Sharded | None = None) -> LowRankWeight:
    """Convert with given factors, whole or in blocks; the core is a full matrix."""
    (m, n), generator = target.shape, torch.Generator().manual_seed(1)
    U, S, Vh = (torch.randn(*shape, generator=generator).double() for shape in ((m, r), (r, r), (r, n)))
    if layout is not None:
        U, Vh = layout.put_rows(U[layout.own_rows(m)], m), layout.put_columns(Vh[:, layout.own_columns(n)], n)
    layer = convert_weight(target, U, S, Vh)
    if layout is not None:
        shard_low_rank(layer)
    return layer


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in found.items()}


def compare(layer: nn.Module, x: Tensor, ports: tuple[bool, bool], r: int | None, layout: Sharded) -> None:
    """Output, gradients of the input and of every parameter, and those of a gradient penalty: split against whole."""
    reference, split = copy.deepcopy(layer), copy.deepcopy(layer)
    target, other = target_of(reference), target_of(split)
    shard_dense(other, layout, input_block=ports[0], output_block=ports[1])
    if r is not None:
        lower(target, r)
        lower(other, r, layout)
    x_whole, x_split = (x.clone().requires_grad_() for _ in range(2))
    expected = reference(x_whole)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).double()
    (expected * weights).sum().backward()
    y = split(scatter_to(x_split, layout) if ports[0] else x_split)
    y = gather_from(y, expected.shape[-1], layout) if ports[1] else y
    (y * weights).sum().backward()
    torch.testing.assert_close(y, expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(x_split.grad, x_whole.grad, rtol=TOLERANCE, atol=TOLERANCE)
    wanted, found = gradients(reference), gradients(split)
    assert sorted(found) == sorted(wanted)
    assert ("S" in found) == (r is not None)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=TOLERANCE, atol=TOLERANCE)
    if r is not None:
        same_everywhere(found["S"], layout)
    for model, of in ((reference, x_whole), (split, x_split)):
        model.zero_grad()
        z = of.detach().requires_grad_()
        y = model(scatter_to(z, layout) if ports[0] and model is split else z)
        y = gather_from(y, expected.shape[-1], layout) if ports[1] and model is split else y
        (g,) = torch.autograd.grad((y.tanh() * weights).sum(), z, create_graph=True)
        (g.square().sum() + y.square().mean()).backward()
        of.grad = z.grad
    torch.testing.assert_close(x_split.grad, x_whole.grad, rtol=TOLERANCE, atol=TOLERANCE)
    wanted, found = gradients(reference), gradients(split)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=TOLERANCE, atol=TOLERANCE)


def same_everywhere(tensor: Tensor, layout: Sharded) -> None:
    copies = [torch.empty_like(tensor) for _ in range(layout.size)]
    dist.all_gather(copies, tensor.contiguous())
    assert all(torch.equal(copy, tensor) for copy in copies)


def linear_layers(n: int, m: int) -> Iterator[nn.Module]:
    yield nn.Linear(n, m).double()
    yield nn.Linear(n, m, bias=False).double()
    yield Conv1D(m, n).double()


def against_whole_layers(rank: int, size: int) -> int:
    layout, count = layout_of(size), 0
    torch.manual_seed(0)
    for (n, m), r in itertools.product(WIDTHS, (None, 3)):
        # On four processes the shards are what is new.
        layers = list(linear_layers(n, m))[: 3 if size == 2 else 1]
        for layer, into, out in itertools.product(layers, (False, True), (False, True)):
            compare(layer, torch.randn(2, TOKENS // 2, n).double(), (into, out), r, layout)
            count += 1
    for r in (None, 3):
        compare(nn.Conv2d(3, 6, 3, padding=1).double(), torch.randn(2, 3, 5, 5).double(), (False,) * 2, r, layout)
        compare(nn.Conv1d(2, 5, 2, stride=2).double(), torch.randn(2, 2, 6).double(), (False,) * 2, r, layout)
        count += 2
    return count


@pytest.mark.parametrize(("size", "count"), [(2, 76), (4, 28)])
def test_equal_to_the_whole_layer(size: int, count: int) -> None:
    assert spawn(against_whole_layers, size) == [count] * size


@contextmanager
def traffic() -> Iterator[Counter[str]]:
    """Numbers handed to each kind of collective."""
    sent: Counter[str] = Counter()
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather")}

    def counted(name: str, position: int) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            sent[name] += args[position].numel()
            return originals[name](*args, **options)

        return call

    dist.all_reduce, dist.all_gather = counted("all_reduce", 0), counted("all_gather", 1)
    try:
        yield sent
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def count_traffic(rank: int, size: int) -> list[tuple[Counter[str], Counter[str]]]:
    """An MLP of three layers, the features between them split: what is sent forward and backward, per phase."""
    layout, counts = layout_of(size), []
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
    targets = replaceable(model)[0]
    for target, (into, out) in zip(targets, ((False, True), (True, True), (True, False)), strict=True):
        shard_dense(target, layout, input_block=into, output_block=out)
    for phase in ("dense", "low-rank"):
        if phase == "low-rank":
            for target, r in zip(targets, (2, 3, 1), strict=True):
                lower(target, r, layout)
            model.double()
        x = torch.randn(TOKENS, 8, dtype=next(model.parameters()).dtype, requires_grad=True)
        with traffic() as forward:
            y = model(x)
        with traffic() as backward:
            y.sum().backward()
        counts.append((forward, backward))
    return counts


def test_a_low_rank_layer_sends_tokens_times_r() -> None:
    for dense, low_rank in spawn(count_traffic, 2):
        opened, closed = TOKENS * 8 // 2, TOKENS * 4 // 2
        cores = TOKENS * (2 + 3 + 1)
        assert low_rank[0] == {"all_reduce": cores, "all_gather": closed}
        assert low_rank[1] == {"all_reduce": cores, "all_gather": opened}
        assert dense[0] == {"all_gather": TOKENS * (16 + 12 + 4) // 2}
        assert dense[1] == {"all_reduce": TOKENS * (8 + 16 + 12)}
