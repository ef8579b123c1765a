"""Whole plans of a tiny recipe."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpc_oialr.engines import DDP, FSDP, DeepSpeed, TensorParallel
from hpc_oialr.plan import presets, request
from hpc_oialr.plan.deployment import Deployment, all_engines, data_processes, incompatibility
from hpc_oialr.plan.planner import Planner
from hpc_oialr.plan.scripted_run import Probe
from hpc_oialr.plan.step_traces import StepTraces
from hpc_oialr.plan.trace_step import trace_step
from hpc_oialr.plan.traffic import messages, total_bytes

GIB = 1024**3


@pytest.fixture(scope="module")
def machine():
    return presets.gpu_machine("a100-40", "hdr200", adapters=2)


@pytest.fixture(scope="module")
def planner(workload, machine):
    return Planner(workload, machine)


@pytest.fixture(scope="module")
def forecasts(planner):
    return planner.forecast([1, 2, 4, 3], 1, DDP())


def test_an_interpolated_step_is_as_if_traced(workload):
    """By the batch under DDP, and by one over the processes under FSDP."""
    for engine, deployments in (
        (DDP(), [Deployment(8, 1, 1), Deployment(4, 1, 2), Deployment(1, 2, 4)]),
        (FSDP(), [Deployment(8, 1, 1), Deployment(4, 1, 2), Deployment(2, 1, 4)]),
    ):
        found = StepTraces(workload).steps(engine, deployments, {})[deployments[1]]
        true = trace_step(workload, engine, processes=4, batch=2, r={})
        assert found.resident.trained == pytest.approx(true.resident.trained, rel=1e-2)
        assert found.resident.state == pytest.approx(true.resident.state, rel=1e-2)
        assert max(found.passes.live) == pytest.approx(max(true.passes.live), rel=1e-2)
        assert found.flops == pytest.approx(true.flops, rel=1e-6)
        assert [m.processes for m in found.passes.messages] == [4] * len(true.passes.messages)
        sizes = [m.size for m in true.passes.messages]
        assert [m.size for m in found.passes.messages] == pytest.approx(sizes, rel=0.1)


def test_a_step_sends_every_gradient_once(forecasts):
    """768 + 256 + 1024 + 1024 weights of four layers become 4 x 4 numbers each, in fp32."""
    dense, end = (forecasts[1].stages[name] for name in ("dense", "end"))
    assert set(end.phase.r.values()) == {4}
    assert dense.sent - end.sent == 4 * (3072 - 4 * 16)
    assert forecasts[0].stages["dense"].sent == 0


def test_an_event_sends_its_factors(forecasts):
    """At r = 12 of k = 16: k values and two bases of each layer; at the first update two rotations and values."""
    sides = (48 + 16) + (16 + 16) + (16 + 64) + (64 + 16)
    assert forecasts[1].events["conversion"].sent == 4 * (4 * 16 + 12 * sides)
    assert forecasts[1].events["update"].sent == 4 * 4 * (2 * 12 * 12 + 12 + 2)
    assert forecasts[0].events["conversion"].sent == 0


def test_buckets_of_ddp(workload):
    step = trace_step(workload, DDP(), processes=2, batch=1, r={})
    third = step.resident.trained / 3
    sent = messages(step, DDP(bucket_cap_mb=third / 1024**2), 2)
    sizes = [m.size for m in sent if m.collective == "all_reduce"]
    assert sizes[:3] == pytest.approx([third] * 3), "a size that the user has set"
    assert sum(sizes) == pytest.approx(step.resident.trained)


def test_fsdp_gathers_twice_and_scatters_once(workload):
    step = trace_step(workload, FSDP(), processes=2, batch=1, r={})
    sent = messages(step, FSDP(), 2)
    model = 2 * step.resident.trained
    gathered = total_bytes([m for m in sent if m.collective == "all_gather"])
    scattered = total_bytes([m for m in sent if m.collective == "reduce_scatter"])
    assert scattered == pytest.approx(model, rel=0.01)
    # The parameters outside the blocks stay gathered until the backward pass is over.
    assert model <= gathered <= 2 * model


def test_batches_that_cannot_be_distributed_are_said(forecasts):
    assert forecasts[3].incompatibility == (
        "8 samples cannot be distributed over 3 processes; 9 can, or take --weak"
    )
    assert [f.deployment.batch for f in forecasts[:3]] == [8, 4, 2]


def test_what_cannot_be():
    how = {"global_batch": 16, "accumulation": 1, "optimizer": "AdamW"}
    assert incompatibility(DDP(), 16, **how) is None
    assert "12 can, or take --weak" in incompatibility(DDP(), 12, **how)
    assert "over 32 processes; 32 can" in incompatibility(FSDP(), 32, **how)
    assert (
        incompatibility(TensorParallel(size=4), 6, **how) == "TensorParallel needs a multiple of 4 processes"
    )
    assert incompatibility(TensorParallel(size=4), 64, **how) is None
    assert data_processes(TensorParallel(size=4), 64) == 16
    assert "which Muon cannot step" in incompatibility(DeepSpeed(), 2, **{**how, "optimizer": "MuonAdamW"})


def test_weak_scaling_keeps_the_batch_of_a_process(workload, machine):
    planner = Planner(workload, machine, weak=True)
    found = planner.forecast([1, 2], 1, DDP())
    assert [(f.deployment.batch, f.global_batch) for f in found] == [(8, 8), (8, 16)]


def test_a_run_is_the_sum_of_its_phases(workload, machine):
    """Of 24 steps 6 are dense; r falls from 12 to 4 in the others, and no SVD takes time."""
    seconds = {"dense": 1.0, "converted": 0.8, "end": 0.2}
    no_svd = replace(machine, svd_flops=float("inf"))
    found = Planner(workload, no_svd, measured=lambda stage, *_: seconds[stage]).forecast([1], 1, DDP())[0]
    assert (found.steps, found.dense_s) == (24, 24.0)
    # 4 steps at r = 12, 2 at 4; the other 12 lie between.
    between = found.oialr_s - 6 * 1.0 - 4 * 0.8 - 2 * 0.2
    assert 12 * 0.2 < between < 12 * 0.8
    assert found.events_s == 0.0
    same = Planner(workload, no_svd, measured=lambda *_: 0.5).forecast([1], 1, DDP())[0]
    assert same.oialr_s == pytest.approx(12.0)


def test_a_measured_conversion_sets_the_speed_of_svds(workload, monkeypatch):
    steps = {(stage, 8, 1): 0.5 for stage in ("dense", "converted", "end")}
    monkeypatch.setattr(request, "probe", lambda *_: Probe(steps, conversion_s=3.0))
    plan = request.prepare(workload.config, request.Request(nodes=[1], probe=True))
    (found,) = plan.planner.forecast([1], 1, DDP())
    assert found.events["conversion"].seconds == pytest.approx(3.0)
    assert found.stages["end"].seconds == 0.5
    assert plan.planner.basis == "measured steps"


def test_too_little_memory_names_the_engines_that_fit(planner, forecasts):
    found = forecasts[2]
    enough, less = found.peak / GIB, 0.9 * found.peak / GIB
    assert found.fits(enough * 1.001)
    assert not found.fits(less)
    text = planner.advice(found, [4], less)
    assert text.startswith("fits with FSDP (")
    assert "DDP (" not in text
    sharded = planner.forecast([4], 1, FSDP())[0]
    assert sharded.peak <= less * GIB, "what is named does fit"
    assert planner.advice(found, [4], 1e-9) == (
        "no engine fits; try --train.activation_checkpointing true, or a smaller --train.global_batch"
    )


def test_engines_of_one_node():
    names = ["DDP", "FSDP", "DeepSpeed", "DeepSpeed", "DeepSpeed"]
    assert [type(e).__name__ for e in all_engines(1)] == names
    assert all_engines(4)[2].size == 4
