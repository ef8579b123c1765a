"""The meter against memory known beforehand."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.spawn import spawn
from torch import Tensor, nn

from hpc_oialr.distributed import World
from hpc_oialr.engines import make_engine
from hpc_oialr.record import MemoryMeter, peak_rss_bytes, resident_bytes
from hpc_oialr.record.memory import TensorTracker
from hpc_oialr.streams import without_lines

MB = 1 << 20


def megabytes(count: int) -> Tensor:
    return torch.zeros(count * MB // 4)


def peak_of(action: Callable[[], object], *alive: Tensor, processes: int = 1) -> float:
    """Peak in MB of an action, with these tensors counted as resident; small change is left out."""
    meter = MemoryMeter(lambda held=list(alive): held, processes=processes)
    alive = ()
    with meter.probe():
        action()
    return round(meter.peak_bytes / MB, 2)


WAYS = pytest.mark.parametrize("processes", [1, 2])  # the profiler; the tracker


@WAYS
def test_temporaries_and_what_stays(processes: int) -> None:
    def action() -> Tensor:
        a = megabytes(4)
        b = megabytes(2)
        del a
        c = megabytes(3)
        return b + c[: len(b)]

    assert peak_of(action, processes=processes) == 7.0


@WAYS
def test_residents_count_once_each(processes: int) -> None:
    first = megabytes(4)
    views = (first, first[:10], first.view(2, -1))
    assert peak_of(lambda: megabytes(2), *views, processes=processes) == 6.0


def test_storages_that_are_resized() -> None:
    """As FSDP2 frees and fills what it gathers."""
    gathered = megabytes(4)

    def action() -> None:
        gathered.untyped_storage().resize_(0)
        b = megabytes(3)
        gathered.untyped_storage().resize_(4 * MB)
        gathered.zero_()
        del b

    assert peak_of(action, gathered, processes=2) == 7.0
    gathered.untyped_storage().resize_(0)
    assert peak_of(lambda: megabytes(3), gathered, processes=2) == 3.0


@WAYS
def test_a_resident_that_dies_makes_room(processes: int) -> None:
    model = nn.Linear(1024, 1024, bias=False)  # 4 MB
    meter = MemoryMeter(lambda: [model], processes=processes)
    with meter.probe():
        model.weight = nn.Parameter(torch.zeros(512, 1024))
    assert round(meter.peak_bytes / MB, 2) == 6.0
    meter = MemoryMeter(lambda: [model], processes=processes)
    with meter.probe():
        model.weight = None
        model.weight = nn.Parameter(torch.zeros(512, 1024))
    assert round(meter.peak_bytes / MB, 2) == 2.0


def test_many_deaths_each_before_its_successor() -> None:
    """Layer by layer, as a conversion does: never more than one layer above what there was."""
    layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(64))  # 1 MB each
    meter = MemoryMeter(lambda: [layers])
    with meter.probe():
        for layer in layers:
            layer.weight = None
            layer.weight = nn.Parameter(torch.empty(512, 512))
    assert round(meter.peak_bytes / MB, 2) == 64.0


def test_a_death_of_something_uncounted_changes_nothing() -> None:
    old = {"uncounted": megabytes(8)}

    def action() -> None:
        a = megabytes(3)
        old.clear()
        b = megabytes(2)
        del a, b

    assert peak_of(action) == 5.0


def test_what_an_earlier_probe_left_does_not_confuse_a_later_one() -> None:
    kept: list[Tensor] = []
    for _ in range(3):
        assert peak_of(lambda: kept.append(megabytes(5))) == 5.0
    kept.clear()  # outside: the allocator keeps their sizes
    fresh = [megabytes(5) for _ in range(3)]  # perhaps at the same addresses
    assert peak_of(lambda: (megabytes(1), fresh.clear(), megabytes(2))) == 3.0


def test_a_probe_of_nothing_gives_what_is_resident() -> None:
    assert peak_of(lambda: None, megabytes(3)) == 3.0


def test_the_highest_probe_counts() -> None:
    meter = MemoryMeter(list)
    for size in (2, 5, 3):
        with meter.probe():
            megabytes(size)
    assert round(meter.peak_bytes / MB, 2) == 5.0


def test_an_error_inside_passes_through_and_the_meter_goes_on() -> None:
    meter = MemoryMeter(list)
    with pytest.raises(ValueError, match="mine"), meter.probe():
        raise ValueError("mine")
    with meter.probe():
        megabytes(2)
    assert round(meter.peak_bytes / MB, 2) == 2.0


def training_step(width: int, processes: int = 1) -> float:
    torch.manual_seed(0)
    model = nn.Linear(width, width, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False, fused=True)
    x = torch.ones(1, width)
    meter = MemoryMeter(lambda: [model, optimizer], processes=processes)
    for _ in range(2):
        with meter.probe():
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    weight = width * width * 4
    assert resident_bytes(model, optimizer) == 3 * weight + 4, "weight, two moments, a step counter"
    return meter.peak_bytes / weight


@WAYS
def test_a_training_step(processes: int) -> None:
    """Weight, gradient, two moments, and the gradient on its way into place."""
    assert training_step(1024, processes) == pytest.approx(4.0, abs=0.02)


def test_resident_bytes_of_frozen_shared_and_wrapped() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10, affine=False))
    model[0].weight.requires_grad_(False)
    expected = 400 + 2 * 40 + 8
    assert resident_bytes(model) == expected
    model.add_module("again", model[0])
    assert resident_bytes(model) == expected
    model[0].weight.grad = torch.zeros(10, 10)
    assert resident_bytes(model) == expected + 400
    assert resident_bytes(model, torch.zeros(5)) == expected + 420


def ddp_buckets(rank: int, size: int) -> list[float]:
    net = nn.Linear(512, 512, bias=False)  # 1 MB
    model = make_engine(World.from_environment(timeout_s=60)).wrap(net)
    seen = []
    for _ in range(3):
        model(torch.ones(1, 512)).sum().backward()
        seen.append(resident_bytes(model) / MB)
        model.zero_grad()
        seen.append(resident_bytes(model) / MB)
    return seen


def test_gradient_buckets_count_whether_or_not_a_gradient_shows_them() -> None:
    for seen in spawn(ddp_buckets, 2):
        assert seen[2:] == [2.0] * 4


def ddp_step(rank: int, size: int) -> list[float]:
    net = nn.Linear(512, 512, bias=False)  # 1 MB
    model = make_engine(World.from_environment(timeout_s=60)).wrap(net)
    peaks = []
    for _ in range(3):
        meter = MemoryMeter(lambda: [model], processes=size)
        with meter.probe():
            model(torch.ones(1, 512)).sum().backward()
            model.zero_grad()
        peaks.append(round(meter.peak_bytes / MB, 1))
    return peaks


def test_gradient_buckets_count_once() -> None:
    """Weight, bucket, and the gradient on its way into it."""
    assert spawn(ddp_step, 2) == [[3.0] * 3] * 2


def test_what_no_operation_returned_counts_while_it_lives() -> None:
    with TensorTracker([]) as tracker:
        for _ in range(3):
            torch.from_numpy(np.ones(MB // 4, np.float32)).sum()
    assert round(tracker.peak_bytes / MB, 1) == 1.0
    stays = torch.from_numpy(np.ones(MB // 4, np.float32))
    with TensorTracker([]) as tracker:
        megabytes(2)
        stays.sum()
    assert round(tracker.peak_bytes / MB, 1) == 3.0, "it was there before the two"


def test_the_profilers_chatter_is_kept_off_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    old = {"a": megabytes(1)}
    meter = MemoryMeter(list)
    for _ in range(2):
        with meter.probe():
            old.clear()
            os.write(2, b"a message\n")
    assert capfd.readouterr().err == "a message\n" * 2


def test_lines_with_a_marker_are_dropped_also_after_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        os.write(2, b"one\nsome noise here\ntwo")
        raise KeyError

    with pytest.raises(KeyError), without_lines([b"noise"]):
        fail()
    os.write(2, b"three\n")
    assert capfd.readouterr().err == "one\ntwothree\n"


def test_resident_set_size() -> None:
    before = peak_rss_bytes()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    beyond = max(0, before - resident) + 100 * MB
    held = torch.ones(beyond // 4)
    assert before + 90 * MB < peak_rss_bytes() < before + 2 * beyond
    del held
