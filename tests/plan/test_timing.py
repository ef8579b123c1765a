"""Times against figures counted by hand, and against what this repository has measured."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hpc_oialr.engines import DDP, FSDP, TensorParallel
from hpc_oialr.errors import DataError, UnknownNameError
from hpc_oialr.plan import machine as presets
from hpc_oialr.plan.machine import Link, Machine, this_machine
from hpc_oialr.plan.schedule import Phase
from hpc_oialr.plan.step_cost import step_time, svd_seconds
from hpc_oialr.plan.trace_step import Resident, Step
from hpc_oialr.plan.tracer import Message, Trace
from hpc_oialr.plan.workload import Deployment

ROOT = Path(__file__).parents[2]

# Two cores: 10 us and 1 GB/s inside a node, 100 us and 0.5 GB/s for each of two adapters.
MACHINE = Machine(
    speeds="measured: 2 cores (test)",
    links="measured: test",
    assumed="",
    memory_gib=16.0,
    flops={"float32": 5e10, "bfloat16": 2e11},
    bytes_per_s=8e9,
    launch_s=1e-5,
    svd_flops=1e10,
    overlap=0.0,
    inside=Link(1e-5, 1e9),
    between=Link(1e-4, 0.5e9),
    adapters=2,
    cores=2,
    sharing={2: 1.1, 4: 2.3},
)


@pytest.mark.parametrize(
    ("collective", "processes", "milliseconds"),
    [
        # 8 MB at 1 GB/s are 8 ms; 1 ms a latency.
        ("all_reduce", 8, 2 * 3 + 2 * 7.0),
        ("all_gather", 8, 3 + 7.0),
        ("reduce_scatter", 2, 1 + 4.0),
        ("broadcast", 6, 3 + 8 * 5 / 6),
        ("all_reduce", 1, 0.0),
    ],
)
def test_collectives(collective, processes, milliseconds):
    link = Link(latency_s=1e-3, bytes_per_s=1e9)
    assert link.seconds(collective, 8e6, processes) == pytest.approx(1e-3 * milliseconds)


def test_a_fit_of_noisy_times():
    random, true = np.random.default_rng(0), Link(1e-4, 1e9)
    measured = [
        (n, true.seconds("all_reduce", n, 4) * random.uniform(0.9, 1.1))
        for n in (4, 1e3, 1e5, 1e6, 1e7)
        for _ in range(20)
    ]
    found = Link.fit("all_reduce", 4, measured)
    assert found.latency_s == pytest.approx(true.latency_s, rel=0.03)
    assert found.bytes_per_s == pytest.approx(true.bytes_per_s, rel=0.03)


def test_neither_part_of_a_fit_is_negative():
    falling = Link.fit("all_reduce", 2, [(4, 3e-4), (1e6, 2e-4)])
    assert falling.bytes_per_s == float("inf")
    assert 1e-4 < falling.latency_s < 1.5e-4
    assert Link.fit("all_reduce", 2, [(1e3, 1e-7), (1e6, 1e-2)]).latency_s == 0.0


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (Message("all_reduce", 1, 4), Link(1e-5, 1e9)),
        # Both adapters, or the link inside a node if it is slower; two, four or eight groups share the adapters.
        (Message("all_reduce", 1, 32), Link(1e-4, 1e9)),
        (Message("all_reduce", 1, 16), Link(1e-4, 1e9)),
        (Message("all_reduce", 1, 16, stride=2), Link(1e-4, 0.5e9)),
        (Message("all_reduce", 1, 8, stride=4), Link(1e-4, 0.25e9)),
        (Message("all_reduce", 1, 2, stride=16), Link(1e-4, 0.125e9)),
    ],
)
def test_the_slowest_link_of_four_nodes_with_eight_processes(message, expected):
    assert MACHINE.link(message, per_node=8) == expected


def test_processes_share_cores():
    """Half the cores at 2, and the measured slowdown; beyond the last measurement in proportion."""
    assert [MACHINE.threads(p) for p in (1, 2, 4)] == [2, 1, 1]
    assert [MACHINE.slowdown(p) for p in (1, 2, 4, 8)] == pytest.approx([1.0, 1.1, 2.3, 4.6])
    assert MACHINE.speed(2) == pytest.approx(0.5 / 1.1)
    assert [MACHINE.memory_of_process_gib(p) for p in (1, 4)] == [16.0, 4.0]
    gpu = presets.gpu_machine(presets.cluster("horeka"))
    assert (gpu.speed(4), gpu.memory_of_process_gib(4)) == (1.0, 39.4)


def counted_step() -> Step:
    """0.2 s of products in fp32, 0.1 s in bf16 and 0.3 s of moving data in the passes; an update of 2 operations."""
    passes = Trace([1.0], [0.0], Counter({"float32": 1e10, "bfloat16": 2e10}), moved=2.4e9)
    return Step(Resident(0, 0, 0, 0, 0), passes, Trace([0.0, 0.0], [0.0, 0.0]))


def test_time_of_counted_operations():
    one = Deployment(DDP(), 1, 1)
    assert step_time(counted_step(), [], one, MACHINE) == (pytest.approx(0.6 + 2e-5), 0.0)
    two = step_time(counted_step(), [], Deployment(DDP(), 1, 2), MACHINE)
    assert two[0] == pytest.approx(2 * 1.1 * 0.6 + 2e-5)


def test_measured_steps_replace_counted_operations_and_hide_gradients():
    """Of 0.3 s two thirds are the backward pass; of 0.4 s of gradients half of that is hidden."""
    d, gradients = Deployment(DDP(), 1, 2), [Message("all_reduce", 0.4e9 - 2e4, 2)]
    machine = replace(MACHINE, sharing={}, cores=0)
    assert step_time(counted_step(), gradients, d, machine, 0.3) == (0.3, pytest.approx(0.4))
    overlapping = replace(machine, overlap=0.5)
    assert step_time(counted_step(), gradients, d, overlapping, 0.3)[1] == pytest.approx(0.3)
    tensor = Deployment(TensorParallel(size=2), 1, 2)
    assert step_time(counted_step(), gradients, tensor, overlapping, 0.3)[1] == pytest.approx(0.4), (
        "activations are waited for"
    )


def test_svds_are_distributed():
    """26 k^3 for a square matrix: two of 100 x 100 on one process, or one each; a core of r = 10 at the update."""
    shapes = dict.fromkeys("ab", (100, 100))
    conversion = Phase(1, 1, "conversion", {"a": 100, "b": 100}, {"a": 10, "b": 10})
    gpu = replace(MACHINE, cores=0)
    times = [svd_seconds(conversion, shapes, Deployment(DDP(), p, 1), gpu) for p in (1, 2, 8)]
    assert times == pytest.approx([2 * 26e6 / 1e10, 26e6 / 1e10, 26e6 / 1e10])
    update = Phase(2, 1, "update", {"b": 10}, {"a": 10, "b": 5})
    assert svd_seconds(update, shapes, Deployment(FSDP(), 8, 1), gpu) == pytest.approx(26e3 / 1e10)
    # Both together on all eight: an eighth of 6 k^3, and 20 k^3 twice (three levels of a tree).
    together = svd_seconds(conversion, shapes, Deployment(FSDP(), 8, 1), gpu)
    assert together == pytest.approx(2 * (6e6 / 8 + 40e6) / 1e10)


def test_presets_by_name():
    site = presets.cluster("juwels-booster")
    assert (site.gpu, site.gpus_per_node, site.adapters) == ("a100-40", 4, 4)
    assert presets.gpu_machine(site).between.bytes_per_s == pytest.approx(20e9), "80 % of 25 GB/s"
    with pytest.raises(UnknownNameError, match="unknown GPU 'a100'; valid: a100-40, a100-80, h100, mi250x"):
        presets.gpu_machine(site._replace(gpu="a100"))
    with pytest.raises(UnknownNameError, match="unknown site 'lumy'; .*Did you mean 'lumi'"):
        presets.cluster("lumy")


def test_every_cluster_has_presets():
    for site in presets.CLUSTERS.values():
        machine = presets.gpu_machine(site)
        assert machine.speeds.startswith(f"stated: {site.gpu} (")
        assert machine.links.startswith(f"stated: {site.network} (")


def test_measured_collectives_of_this_repository_are_explained():
    """What was measured by gloo with 1 MiB and more, from the links that were fitted to it, within a factor of 2."""
    path = ROOT / "benchmarks" / "results" / "comm.json"
    machine = this_machine(path)
    assert machine.links == f"measured: gloo ({path})"
    assert machine.slowdown(4) > 1.5
    large = [
        row for row in json.loads(path.read_text())["rows"] if row["backend"] == "gloo" and row["bytes"] >= 1 << 20
    ]
    assert len(large) > 20
    for row in large:
        message = Message(row["collective"], row["bytes"], row["processes"])
        seconds = machine.messages_s([message], row["processes"])
        assert 0.5 < seconds / row["seconds"] < 2


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"rows": [], "backend": "gloo"}', None])
def test_another_file_is_no_calibration(tmp_path, content):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        DataError, match=r"other.json is not a result of python -m benchmarks.comm \(.*Make one: python -m"
    ):
        this_machine(path)
