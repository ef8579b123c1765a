"""Whole plans of a tiny recipe."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hpc_oialr.engines import DDP, FSDP
from hpc_oialr.linalg.work_plan import svd_cost
from hpc_oialr.plan import presets
from hpc_oialr.plan.advice import advice, all_engines, fits
from hpc_oialr.plan.forecast import Speeds
from hpc_oialr.plan.interpolation import Rehearsals
from hpc_oialr.plan.places import Place
from hpc_oialr.plan.planner import Assumptions, Planner
from hpc_oialr.plan.probe import Probe
from hpc_oialr.plan.recorder import Message
from hpc_oialr.plan.rehearsal import rehearse
from hpc_oialr.plan.timing import Machine, event_time, step_time, with_measured_event
from hpc_oialr.plan.traffic import messages, total_bytes

GIB = 1024**3


@pytest.fixture(scope="module")
def machine():
    device = presets.gpu("a100-40")
    return Machine(device, presets.network("hdr200", device, adapters=2))


@pytest.fixture(scope="module")
def planner(subject, machine):
    return Planner(subject, machine)


@pytest.fixture(scope="module")
def forecasts(planner):
    return planner.forecast([1, 2, 4, 3], 1, DDP())


def test_what_lies_between_two_rehearsed_steps(subject):
    """By the batch under DDP, and by one over the processes under FSDP: as if it had been rehearsed."""
    for engine, places in (
        (DDP(), [Place(8, 1, 1), Place(4, 1, 2), Place(1, 2, 4)]),
        (FSDP(), [Place(8, 1, 1), Place(4, 1, 2), Place(2, 1, 4)]),
    ):
        found = Rehearsals(subject).steps(engine, places, {})[places[1]]
        true = rehearse(subject, engine, processes=4, batch=2, r={})
        assert found.tensors.total == pytest.approx(true.tensors.total, rel=1e-2)
        assert max(found.forward_backward.live) == pytest.approx(max(true.forward_backward.live), rel=1e-2)
        assert found.forward_backward.work.total_flops == pytest.approx(
            true.forward_backward.work.total_flops, rel=1e-6
        )
        assert [m.processes for m in found.forward_backward.messages] == [4] * len(
            true.forward_backward.messages
        )
        sizes = [m.size for m in true.forward_backward.messages]
        assert [m.size for m in found.forward_backward.messages] == pytest.approx(sizes, rel=0.1)


def test_a_step_sends_every_gradient_once(planner, forecasts):
    """Under DDP r^2 numbers for a low-rank layer in place of m n."""
    dense, end = (forecasts[1].stages[name] for name in ("dense", "end"))
    saved = sum(s.m * s.n - end.phase.r[s.name] ** 2 for s in planner.shapes.values())
    assert dense.time.sent_bytes - end.time.sent_bytes == 4 * saved
    assert forecasts[0].stages["dense"].time.sent_bytes == 0


def test_fsdp_gathers_twice_and_scatters_once(subject):
    step = rehearse(subject, FSDP(), processes=2, batch=1, r={})
    sent = messages(step, FSDP(), Place(2, 1, 1))
    whole = 2 * step.tensors.trained
    gathered = total_bytes([m for m in sent if m.collective == "all_gather"])
    scattered = total_bytes([m for m in sent if m.collective == "reduce_scatter"])
    assert scattered == pytest.approx(whole, rel=0.01)
    # The parameters outside the blocks stay gathered until the backward pass is over.
    assert whole <= gathered <= 2 * whole


def test_batches_that_cannot_be_dealt_are_said(forecasts):
    assert forecasts[3].misfit == "8 samples cannot be dealt to 3 processes; 9 can, or take --weak"
    assert [f.place.batch for f in forecasts[:3]] == [8, 4, 2]


def test_weak_scaling_keeps_the_batch_of_a_process(subject, machine):
    planner = Planner(subject, machine, Assumptions(weak=True))
    found = planner.forecast([1, 2], 1, DDP())
    assert [(f.place.batch, f.global_batch) for f in found] == [(8, 8), (8, 16)]


def test_a_run_is_the_sum_of_its_phases(planner, forecasts):
    found = forecasts[0]
    speeds, run = Speeds(found.stages, planner.shapes), planner.phases(found.steps)
    events = sum(
        event_time(p, planner.shapes, found.place, planner.machine, split=False).total_s for p in run[1:]
    )
    assert found.events_s == pytest.approx(events)
    assert found.oialr_s == pytest.approx(sum(p.steps * speeds.seconds(p) for p in run) + events)
    assert found.dense_s == pytest.approx(found.steps * found.stages["dense"].time.total_s)
    first, last = (found.stages[name].time.total_s for name in ("converted", "end"))
    assert all(min(first, last) <= speeds.seconds(p) <= max(first, last) for p in run[1:])


def test_svds_of_an_event_are_dealt(planner):
    """One process does all four; four processes one each, or what is left of the largest."""
    phase = planner.first_events["conversion"]
    alone, dealt = (
        event_time(phase, planner.shapes, Place(p, 1, 1), planner.machine, split=False) for p in (1, 4)
    )
    costs = [svd_cost(s.m, s.n) for s in planner.shapes.values()]
    assert alone.svd_s * planner.machine.device.svd_flops == pytest.approx(sum(costs))
    assert dealt.svd_s * planner.machine.device.svd_flops == pytest.approx(max(costs))
    assert (alone.waiting_s, dealt.waiting_s > 0) == (0.0, True)
    numbers = sum(s.k + phase.r[s.name] * (s.m + s.n) for s in planner.shapes.values())
    assert dealt.sent_bytes == 4 * numbers


def test_a_measured_conversion_sets_the_speed_of_svds(planner):
    phase = planner.first_events["conversion"]
    machine = with_measured_event(planner.machine, phase, planner.shapes, 3.0)
    assert event_time(phase, planner.shapes, Place(1, 1, 1), machine, split=False).total_s == pytest.approx(
        3.0
    )


def test_measured_steps_go_before_the_roofline(subject, machine):
    probe = Probe({("dense", 4, 1): 0.4, ("dense", 8, 1): 0.6})
    assert [probe.seconds("dense", b, 1) for b in (4, 6, 8, 16)] == pytest.approx([0.4, 0.5, 0.6, 1.0])
    step, place = rehearse(subject, DDP(), processes=2, batch=4, r={}), Place(2, 1, 4)
    found = step_time(step, DDP(), place, machine, probe.seconds("dense", 4, 1))
    assert found.compute_s == 0.4
    assert found.waiting_s == 0.0, "such small messages are hidden by the backward pass"
    slow = replace(machine, device=replace(machine.device, overlap=0.0))
    expected = sum(
        slow.network.seconds(m.collective, m.size, slow_place(m)) for m in messages(step, DDP(), place)
    )
    assert step_time(step, DDP(), place, slow, 0.4).waiting_s == pytest.approx(expected)
    third = step.tensors.trained / 3 / 1024**2
    sent = [m.size for m in messages(step, DDP(bucket_cap_mb=third), place) if m.collective == "all_reduce"]
    assert sent[:3] == pytest.approx([step.tensors.trained / 3] * 3), "a size that the user has set"


def slow_place(_: Message):
    from hpc_oialr.plan.network import Placement

    return Placement(2, 1)


def test_too_little_memory_names_the_engines_that_fit(planner, forecasts):
    found = forecasts[2]
    enough, less = found.peak / GIB, 0.9 * found.peak / GIB
    assert fits(found, enough * 1.001)
    assert not fits(found, less)
    text = advice(planner, found, [4], less)
    assert text.startswith("fits with FSDP (")
    assert "DDP (" not in text
    sharded = planner.forecast([4], 1, FSDP())[0]
    assert sharded.peak <= less * GIB, "what is named does fit"
    assert advice(planner, found, [4], 1e-9) == (
        "no engine fits; try --train.activation_checkpointing true, or a smaller --train.global_batch"
    )


def test_engines_of_one_node():
    assert [type(e).__name__ for e in all_engines(1)] == [
        "DDP",
        "FSDP",
        "DeepSpeed",
        "DeepSpeed",
        "DeepSpeed",
    ]
    assert all_engines(4)[2].size == 4
