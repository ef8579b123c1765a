"""Predicted memory against memory counted by hand and measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.two_layers import MIB, two_layers

from hpc_oialr import FixedFraction, OIALRConfig
from hpc_oialr.distributed import World
from hpc_oialr.engines import DDP, FSDP, DeepSpeed, SingleEngine, TensorParallel
from hpc_oialr.models import GPT2
from hpc_oialr.plan.machine import ClusterPreset, gpu_machine
from hpc_oialr.plan.planner import Planner
from hpc_oialr.plan.schedule import Phase
from hpc_oialr.plan.scripted_run import ScriptedRun
from hpc_oialr.plan.step_cost import footprint, sharded_event_bytes
from hpc_oialr.plan.trace_step import Resident, Step, trace_step
from hpc_oialr.plan.tracer import Trace
from hpc_oialr.plan.workload import Deployment, Workload
from hpc_oialr.record import MemoryMeter
from hpc_oialr.train.load_config import load_config


def test_weights_gradients_and_moments_of_one_process():
    """Two weights of 1 MiB: each once, two moments, a gradient; activations are small."""
    step = trace_step(two_layers(512, 1), Deployment(DDP(), 1, 1, 1), {})
    found = footprint(step, Deployment(DDP(), 1, 1))
    assert found.parameters == 2 * MIB
    assert found.state == 4 * MIB + 8, "two moments and a counter each"
    assert found.peak / MIB == pytest.approx(8.0, abs=0.02)


def test_buckets_of_ddp_are_always_there():
    """A bucket for both gradients, and one gradient on its way into it."""
    step = trace_step(two_layers(512, 1), Deployment(DDP(), 4, 1, 1), {})
    assert footprint(step, Deployment(DDP(), 4, 1)).peak / MIB == pytest.approx(2 + 4 + 2 + 1, abs=0.02)
    apart = DDP(gradient_as_bucket_view=False)
    assert footprint(step, Deployment(apart, 4, 1)).peak / MIB == pytest.approx(2 + 4 + 2 + 2, abs=0.02)


def test_activations_of_a_large_batch():
    """At most four: the batch, what ReLU gave, the gradient behind it, the gradient before it."""
    batch, width = 1 << 15, 8
    step = trace_step(two_layers(width, batch), Deployment(DDP(), 1, 1, batch), {})
    assert footprint(step, Deployment(DDP(), 1, 1)).activations / MIB == pytest.approx(4.0, abs=0.01)


def test_shards_of_fsdp():
    """Between steps a quarter of everything."""
    step = trace_step(two_layers(512, 1), Deployment(FSDP(), 4, 1, 1), {})
    found = footprint(step, Deployment(FSDP(), 4, 1))
    assert found.parameters == 2 * MIB // 4
    assert found.state == pytest.approx(MIB, abs=64)


MEASURED = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "memory.json").read_text())["rows"]


def of_results(engine: str) -> float:
    """Peak of forward and backward pass on 4 processes, as committed."""
    (row,) = [r for r in MEASURED if (r["kind"], r["engine"], r["optimizer"]) == ("phases", engine, "AdamW")]
    return float(row["dense_step_mib"])


@pytest.mark.parametrize(
    ("engine", "processes", "precision", "resident", "peak"),
    [
        (DDP(), 4, "fp32", 164.34, of_results("ddp")),
        (FSDP(), 4, "fp32", None, of_results("fsdp")),
        pytest.param(TensorParallel(size=2), 4, "fp32", None, of_results("tensor"), marks=pytest.mark.long),
        # By MemoryMeter around a step under DeepSpeed 0.19.8, on 2 and 4 gloo processes.
        (DeepSpeed(stage=1), 2, "fp32", 102.71, 184.95),
        pytest.param(DeepSpeed(stage=1), 4, "fp32", 71.90, 125.55, marks=pytest.mark.long),
        (DeepSpeed(stage=1), 2, "bf16", 82.17, 154.01),
        (DeepSpeed(stage=2), 2, "fp32", 102.71, 184.95),
        (DeepSpeed(stage=3), 2, "fp32", 83.57, 144.91),
    ],
)
def test_a_step_as_measured(recipe, engine, processes, precision, resident, peak):
    """A GPT-2 of width 384 and six blocks under AdamW, two samples of 64 tokens a process."""
    config = load_config(recipe).config
    model, train = GPT2(dim=384, depth=6, heads=6), replace(config.train, precision=precision)
    tokens = torch.zeros(64, dtype=torch.int64)
    config = replace(config, model=model, train=train)
    workload = Workload(config, {"input_ids": tokens, "labels": tokens}, samples=8)
    d = Deployment(engine, processes, 1, batch=2)
    found = footprint(trace_step(workload, d, {}), d)
    assert found.peak / MIB == pytest.approx(peak, rel=0.07)
    if resident is not None:
        assert found.resident / MIB == pytest.approx(resident, rel=0.02)


def test_one_process_needs_no_engine():
    """100 bytes trained, 60 frozen, 4 of buffers, 200 of moments; 30 live, then 40 of which 25 are gradients."""
    passes = Trace(live=[30.0, 40.0], gradients=[0.0, 25.0])
    step = Step(Resident(100, 60, 4, 200, 50), passes, Trace(live=[35.0], gradients=[35.0]))
    found = footprint(step, Deployment(DeepSpeed(stage=3), 1, 1))
    assert (found.resident, found.peak) == (364, 364 + 40)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-params"])
def test_steps_and_events_as_measured(precision):
    """A layer of 512 x 512 becomes low-rank, then its r is cut to 256; by MemoryMeter, on one process."""
    dense = two_layers(512, 8)
    method, train = (
        OIALRConfig(delay=2, frequency=2, rule=FixedFraction(0.25)),
        replace(dense.config.train, steps=20, precision=precision),
    )
    workload = replace(dense, config=replace(dense.config, oialr=method, train=train))
    planner = Planner(workload, gpu_machine(ClusterPreset("h100", "hdr200", 1, 1)), memory_gib=80.0)
    (row,) = planner.rows([1], 1, DDP())
    run = ScriptedRun(workload.run_context(SingleEngine(World()), batch=8, rule=planner.rule))
    samples, held = run.samples(8), (run.context.module, run.context.optimizer)

    def measured_gib(action: Callable[[], object]) -> float:
        meter = MemoryMeter(lambda: (*held, *run.method.gathered), "cpu", processes=1)
        with meter.probe():
            action()
        return meter.peak_bytes / 1024**3

    run.train(samples)
    found = {"dense": measured_gib(lambda: run.train(samples))}
    found["conversion"] = measured_gib(run.convert)
    found["converted"] = measured_gib(lambda: run.train(samples))
    run.expect("update")
    run.train(samples)
    found["update"] = measured_gib(run.update)
    assert list(run.method.r.values()) == [256]
    assert found == pytest.approx({name: row[f"{name}_peak_gib"] for name in found}, rel=0.01)


def test_events_of_sharded_matrices():
    shapes = {"a": (8, 4)}
    conversion = Phase(1, 1, "conversion", {"a": 4}, {"a": 2})
    # Rows of process 0 and their copy, 2 x 8 numbers; two 4 x 4 factors on each of two levels, and six more.
    assert sharded_event_bytes(shapes, conversion, 4) == 4 * (16 + 4 * 16 + 6 * 16)
    # Three 2 x 2 factors of a core, twice.
    update = Phase(1, 1, "update", {"a": 2}, {"a": 1})
    assert sharded_event_bytes(shapes, update, 4) == 4 * 24
    # Whole bases of r (m + n) numbers.
    assert sharded_event_bytes(shapes, conversion, 4, whole_bases=True) == 4 * (16 + 4 * 16 + 6 * 16 + 2 * 12)
    assert sharded_event_bytes(shapes, update, 4, whole_bases=True) == 4 * (24 + 12)
