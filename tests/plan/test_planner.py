"""Whole plans of a tiny recipe."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import pytest

from hpc_oialr.engines import DDP, FSDP, DeepSpeed, TensorParallel
from hpc_oialr.plan.machine import GIB, cluster, gpu_machine
from hpc_oialr.plan.planner import Planner
from hpc_oialr.plan.schedule import Phase
from hpc_oialr.plan.scripted_run import Measured
from hpc_oialr.plan.step_cost import event_messages, footprint, messages
from hpc_oialr.plan.trace_step import Resident, Step, trace_step
from hpc_oialr.plan.tracer import Trace
from hpc_oialr.plan.workload import Deployment, all_engines


@pytest.fixture(scope="module")
def machine():
    return gpu_machine(cluster("horeka"))


@pytest.fixture(scope="module")
def traced(workload, machine):
    return Planner(workload, machine, memory_gib=40.0)


@pytest.fixture
def planner(traced):
    """A test's own, to be told of other machines and speeds; what was traced before is shared."""
    return copy(traced)


@pytest.fixture(scope="module")
def rows(traced):
    return traced.rows([1, 2, 4, 3], 1, DDP())


@pytest.fixture(scope="module")
def by_weights(workload, machine):
    """On one and two processes, where weights alone choose the bases."""
    return Planner(with_method(workload, importance="weights"), machine, memory_gib=40.0).rows([1, 2], 1, DDP())


def test_a_step_sends_every_gradient_once(planner, rows):
    """768 + 256 + 1024 + 1024 weights of four layers become 4 x 4 numbers each, in fp32."""
    assert set(planner.stages["end"].r.values()) == {4}
    saved = rows[1]["dense_sent_mb"] - rows[1]["end_sent_mb"]
    assert 1e6 * saved == pytest.approx(4 * (3072 - 4 * 16))
    assert rows[0]["dense_sent_mb"] == 0


def test_an_event_sends_its_factors(by_weights):
    """At r = 12 of k = 16: k values and two bases of each layer; at the first update two rotations and values."""
    sides = (48 + 16) + (16 + 16) + (16 + 64) + (64 + 16)
    assert 1e6 * by_weights[1]["conversion_sent_mb"] == pytest.approx(4 * (4 * 16 + 12 * sides))
    assert 1e6 * by_weights[1]["update_sent_mb"] == pytest.approx(4 * 4 * (2 * 12 * 12 + 12 + 2))
    assert by_weights[0]["conversion_sent_mb"] == 0


def test_buckets_of_ddp(workload):
    step = trace_step(workload, Deployment(DDP(), 2, 1, 1), {})
    third = step.resident.trained / 3
    sent = messages(step, Deployment(DDP(bucket_cap_mb=third / 1024**2), 2, 1))
    sizes = [m.size for m in sent if m.collective == "all_reduce"]
    assert sizes[:3] == pytest.approx([third] * 3), "a size that the user has set"
    assert sum(sizes) == pytest.approx(step.resident.trained)


def test_fsdp_gathers_twice_and_scatters_once(workload):
    step = trace_step(workload, Deployment(FSDP(), 2, 1, 1), {})
    sent = messages(step, Deployment(FSDP(), 2, 1))
    model = 2 * step.resident.trained
    gathered = sum(m.size for m in sent if m.collective == "all_gather")
    scattered = sum(m.size for m in sent if m.collective == "reduce_scatter")
    assert scattered == pytest.approx(model, rel=0.01)
    # The parameters outside the blocks stay gathered until the backward pass is over.
    assert model <= gathered <= 2 * model


def test_whole_bases_are_gathered_at_events_only(workload, planner):
    r, gathered, frozen = dict.fromkeys(planner.shapes, 8), {}, {}
    for place in ("sharded", "replicated"):
        d = Deployment(FSDP(frozen=place), 2, 1)
        step = trace_step(workload, d, r)
        gathered[place] = sum(m.size for m in messages(step, d) if m.collective == "all_gather")
        frozen[place] = step.resident.frozen
    assert frozen["replicated"] == pytest.approx(2 * frozen["sharded"])
    assert gathered["sharded"] - gathered["replicated"] >= frozen["replicated"]
    shapes, update = {"a": (8, 4)}, Phase(1, 1, "update", {"a": 2}, {"a": 1})
    kinds = [(m.collective, m.size) for m in event_messages(update, shapes, 2, whole_bases=True)]
    assert kinds == [("all_gather", 4.0 * 12), ("broadcast", 4.0 * 12)]


def test_zero_sends_parameters_instead_of_gradients():
    """100 bytes trained, 60 frozen; each stage reduces and scatters gradients, and gathers parameters."""
    step = Step(Resident(100, 60, 4, 200, 50), Trace(), Trace())
    sent = [[m.size for m in messages(step, Deployment(DeepSpeed(stage=stage), 4, 1))] for stage in (1, 2, 3)]
    assert sent == [[100, 100], [100, 100], [100, 160, 160]]
    half = messages(replace(step, half=True), Deployment(DeepSpeed(stage=3), 4, 1))
    assert [m.size for m in half] == [50, 80, 80]


def test_batches_that_cannot_be_distributed_are_said(rows):
    assert rows[3]["advice"] == "8 samples cannot be distributed over 3 ranks; 9 can, or take --weak"
    assert [row["batch"] for row in rows[:3]] == [8, 4, 2]


def test_what_cannot_be():
    def reason(engine, processes, optimizer="AdamW"):
        return Deployment(engine, processes, 1).incompatibility(16, accumulation=1, optimizer=optimizer)

    assert reason(DDP(), 16) is None
    assert "12 can, or take --weak" in reason(DDP(), 12)
    assert "over 32 ranks; 32 can" in reason(FSDP(), 32)
    assert reason(TensorParallel(size=4), 6) == "TensorParallel needs a multiple of 4 ranks"
    assert reason(TensorParallel(size=4), 64) is None
    assert Deployment(TensorParallel(size=4), 64, 1).groups == 16
    assert "which Muon cannot step" in reason(DeepSpeed(), 2, "MuonAdamW")


def test_weak_scaling_keeps_the_batch_of_a_process(planner, rows):
    planner.weak = True
    found = planner.rows([1, 2], 1, DDP())
    assert [(row["batch"], row["global_batch"]) for row in found] == [(8, 8), (8, 16)]


def test_a_run_is_the_sum_of_its_phases(planner, rows):
    """Of 24 steps 6 are dense; r falls from 12 to 4 in the others, and no SVD takes time."""
    planner.machine = replace(planner.machine, svd_flops=float("inf"))
    planner.use(Measured({("dense", 8): 1.0, ("converted", 8): 0.8, ("end", 8): 0.2}))
    (row,) = planner.rows([1], 1, DDP())
    assert (row["steps"], row["dense_s"], row["events_s"]) == (24, 24.0, 0.0)
    assert row["time_from"] == "measured steps"
    # 4 steps at r = 12, 2 at 4; the other 12 lie between.
    assert 12 * 0.2 < row["oialr_s"] - 6 * 1.0 - 4 * 0.8 - 2 * 0.2 < 12 * 0.8
    planner.use(Measured({(stage, 8): 0.5 for stage in ("dense", "converted", "end")}))
    assert planner.rows([1], 1, DDP())[0]["oialr_s"] == pytest.approx(12.0)


def with_method(workload, **options):
    config = workload.config
    return replace(workload, config=replace(config, oialr=replace(config.oialr, **options)))


# Features of the four layers before and behind them.
INPUTS, OUTPUTS = (16, 16, 16, 64), (48, 16, 64, 16)


@pytest.mark.parametrize(("importance", "seen"), [("auto", [INPUTS]), ("inputs and gradients", [INPUTS, OUTPUTS])])
def test_second_moments_are_counted(workload, machine, by_weights, importance, seen):
    """n^2 numbers of each layer before the conversion, r^2 of each core, r = 12, before an update; what they choose."""
    planner = Planner(with_method(workload, importance=importance), machine, memory_gib=40.0)
    rows = planner.rows([1, 2], 1, DDP())
    dense, cores = sum(n * n for side in seen for n in side), 4 * len(seen) * 12**2
    for before, row in zip(by_weights, rows, strict=True):
        assert before["conversion_moments_gib"] == before["update_moments_gib"] == 0
        assert row["conversion_moments_gib"] * GIB == 4 * dense
        assert row["update_moments_gib"] * GIB == 4 * cores
        assert row["update_peak_gib"] > before["update_peak_gib"]
        several = row["processes"] > 1
        more = {name: 1e6 * (row[f"{name}_sent_mb"] - before[f"{name}_sent_mb"]) for name in ("conversion", "update")}
        assert more["conversion"] == pytest.approx(several * 4 * (dense + 4 * (12 + 1)))
        assert more["update"] == pytest.approx(several * 4 * (cores + 4 * (2 * 12 * 12 + 12)))


def test_where_second_moments_are(workload, planner, rows):
    """On a CPU they are in the same memory; under tensor parallelism there are none."""
    on_gpu = rows[0]
    note = "counted: 1.8e-05 GiB of second moments before the conversion, in the host's memory of each process"
    assert note in planner.grounds()
    planner.machine = host = replace(planner.machine, cores=4)
    (on_cpu,) = planner.rows([1], 1, DDP())
    assert on_cpu["conversion_peak_gib"] >= on_cpu["dense_peak_gib"] + on_cpu["conversion_moments_gib"]
    assert on_cpu["conversion_peak_gib"] > on_gpu["conversion_peak_gib"]
    (tensor,) = planner.rows([2], 1, TensorParallel(size=2))
    assert tensor["conversion_moments_gib"] == 0
    (refused,) = Planner(with_method(workload, importance="inputs"), host, 40.0).rows([2], 1, TensorParallel(size=2))
    assert (refused["fits"], refused["advice"].partition(";")[0]) == (False, "importance is 'inputs'")


def test_trained_bases_cost_gradients_and_moments(workload, machine, rows):
    """Under AdamW two moments of every basis, and a step counter of each of eight."""
    planner = Planner(with_method(workload, train="factors"), machine, memory_gib=40.0)
    assert set(planner.stages) == {"dense", "converted", "end"}
    bases = sum(r * sum(planner.shapes[name]) for name, r in planner.stages["end"].r.items())
    for before, row in zip(rows[:2], planner.rows([1, 2], 1, DDP()), strict=True):
        assert (row["end_optimizer_gib"] - before["end_optimizer_gib"]) * GIB == 2 * 4 * bases + 4 * 8
        assert (row["end_gradients_gib"] > 0) == (row["processes"] > 1)
        sent = 4e-6 * bases if row["processes"] > 1 else 0
        assert row["end_sent_mb"] - before["end_sent_mb"] == pytest.approx(sent)
        assert row["end_gflop"] > before["end_gflop"]
        assert row["dense_gflop"] == before["dense_gflop"]
        assert row["update_peak_gib"] > before["update_peak_gib"]
    (refused,) = planner.rows([2], 1, FSDP())
    assert (refused["fits"], refused["advice"]) == (
        False,
        "trains no bases (oialr.train, oialr.bases_trained); DDP does",
    )


def test_a_phase_of_trained_bases_has_a_stage(workload, machine):
    planner = Planner(with_method(workload, bases_trained=[(12, 18)]), machine, memory_gib=40.0)
    assert [name for name, phase in planner.stages.items() if phase.trained] == ["factors"]
    (row,) = planner.rows([1], 1, DDP())
    assert row["factors_optimizer_gib"] > row["converted_optimizer_gib"]
    stages = {"dense": 1.0, "converted": 0.5, "end": 0.5, "factors": 0.75}
    planner.use(Measured({(stage, 8): seconds for stage, seconds in stages.items()}))
    row = planner.rows([1], 1, DDP())[0]
    assert row["oialr_s"] - row["events_s"] == pytest.approx(6 * 1.0 + 12 * 0.5 + 6 * 0.75)


def test_bases_that_grow_cost_sketches(workload, machine):
    """Four products of q columns with inputs and gradients, inputs kept, sums and test matrices; one sum over ranks."""
    planner = Planner(with_method(workload, grow=0.25, importance="weights"), machine, memory_gib=40.0)
    method, phase = planner.workload.config.oialr, planner.stages["growing"]
    assert phase == planner.stages["converted"]
    columns = {n: method.limits.most_new(r, min(planner.shapes[n]), 0.25) for n, r in phase.r.items()}
    sizes = {name: q * sum(planner.shapes[name]) for name, q in columns.items()}
    assert all(q >= 3 for q in columns.values())
    for engine, processes in ((DDP(), 1), (FSDP(), 2)):
        d = planner.deployment(processes, 1, engine)
        growing, frozen = (planner._step(d, phase, growing=each) for each in (True, False))
        tokens = d.batch * workload.sample["input_ids"].numel()
        assert growing.passes.flops.total() - frozen.passes.flops.total() == 4 * tokens * sum(sizes.values())
        assert footprint(growing, d).peak > footprint(frozen, d).peak + 2 * 4 * sum(sizes.values())
    update, d = planner.first_events["update"], planner.deployment(2, 1, DDP())
    factors = sum(m.size for m in event_messages(update, planner.shapes, 2))
    assert planner._event(update, d)[2] - factors == pytest.approx(4 * sum(sizes[name] for name in update.before))
    (refused,) = planner.rows([1], 2, TensorParallel(size=2))
    assert (refused["fits"], refused["advice"]) == (False, "its layers see parts of inputs and gradients (oialr.grow)")


def test_a_measured_conversion_sets_the_speed_of_svds(planner, rows):
    planner.use(Measured(conversion_s=3.0))
    (row,) = planner.rows([1], 1, DDP())
    assert row["conversion_s"] == pytest.approx(3.0)


def test_too_little_memory_names_the_engines_that_fit(planner, rows):
    peak = rows[2]["peak_gib"]
    planner.memory_gib = 1.001 * peak
    assert planner.rows([4], 1, DDP())[0]["fits"]
    planner.memory_gib = 0.9 * peak
    (row,) = planner.rows([4], 1, DDP())
    assert not row["fits"]
    assert row["advice"].startswith("fits with FSDP (")
    assert "DDP (" not in row["advice"]
    assert planner.rows([4], 1, FSDP())[0]["peak_gib"] <= 0.9 * peak, "what is named does fit"
    planner.memory_gib = 1e-9
    assert planner.rows([4], 1, DDP())[0]["advice"] == (
        "no engine fits; try --train.activation_checkpointing true, or a smaller --train.global_batch"
    )


def test_engines_of_one_node():
    names = ["DDP", "FSDP", "DeepSpeed", "DeepSpeed", "DeepSpeed"]
    assert [type(e).__name__ for e in all_engines(1)] == names
    assert all_engines(4)[2].size == 4
