"""Memory that is predicted against memory that is counted by hand."""

from __future__ import annotations

import pytest
from support.two_layers import MIB, two_layers

from hpc_oialr.engines import DDP, FSDP, DeepSpeed
from hpc_oialr.plan.footprint import footprint
from hpc_oialr.plan.schedule import LayerShape, Phase
from hpc_oialr.plan.trace_step import Resident, Step, sharded_event_bytes, trace_step
from hpc_oialr.plan.tracer import Trace


def test_weights_gradients_and_moments_of_one_process():
    """Two weights of 1 MiB: each once, two moments, a gradient; activations are small."""
    step = trace_step(two_layers(512, 1), DDP(), processes=1, batch=1, r={})
    found = footprint(step, DDP(), 1)
    assert found.parameters == 2 * MIB
    assert found.state == 4 * MIB + 8, "two moments and a counter each"
    assert found.peak / MIB == pytest.approx(8.0, abs=0.02)


def test_buckets_of_ddp_are_always_there():
    """A bucket for both gradients, and one gradient on its way into it."""
    step = trace_step(two_layers(512, 1), DDP(), processes=4, batch=1, r={})
    assert footprint(step, DDP(), 4).peak / MIB == pytest.approx(2 + 4 + 2 + 1, abs=0.02)
    apart = DDP(gradient_as_bucket_view=False)
    assert footprint(step, apart, 4).peak / MIB == pytest.approx(2 + 4 + 2 + 2, abs=0.02)


def test_activations_of_a_large_batch():
    """At most four: the batch, what ReLU gave, the gradient behind it, the gradient before it."""
    batch, width = 1 << 15, 8
    step = trace_step(two_layers(width, batch), DDP(), processes=1, batch=batch, r={})
    assert footprint(step, DDP(), 1).activations / MIB == pytest.approx(4.0, abs=0.01)


def test_shards_of_fsdp():
    """Between steps a quarter of everything."""
    step = trace_step(two_layers(512, 1), FSDP(), processes=4, batch=1, r={})
    found = footprint(step, FSDP(), 4)
    assert found.parameters == 2 * MIB // 4
    assert found.state == pytest.approx(MIB, abs=64)


def hand_made_step() -> Step:
    """100 bytes trained, 60 frozen, 4 of buffers, 200 of moments; 30 live, then 40 of which 25 are gradients."""
    passes = Trace(live=[30.0, 40.0], gradients=[0.0, 25.0])
    return Step(
        Resident(trained=100, frozen=60, buffers=4, state=200), passes, Trace(live=[35.0], gradients=[35.0])
    )


@pytest.mark.parametrize(
    ("engine", "resident", "peak"),
    [
        (DDP(), 164 + 200 + 100, 464 + 30),
        # fp32 values and moments in parts, a buffer of 1/32 of the gradients; of gradients a quarter.
        (DeepSpeed(stage=1), 164 + 25 + 50, 239 + 30 + 100 / 32),
        # Parameters and gradients in parts too, and 1/8 of the model gathered.
        (DeepSpeed(stage=3), 40 + 4 + 25 + 50 + 25, 144 + 30 + 100 / 32 + 160 / 8),
    ],
)
def test_formulas(engine, resident, peak):
    found = footprint(hand_made_step(), engine, 4)
    assert found.resident == resident
    assert found.peak == peak


def test_one_process_needs_no_engine():
    found = footprint(hand_made_step(), DeepSpeed(stage=3), 1)
    assert (found.resident, found.peak) == (364, 364 + 40)


def test_events_of_sharded_matrices():
    shapes = {"a": LayerShape("a", 8, 4)}
    conversion = Phase(1, 1, "conversion", {"a": 4}, {"a": 2})
    # Rows of process 0 and their copy, 2 x 8 numbers; two 4 x 4 factors on each of two levels, and six more.
    assert sharded_event_bytes(shapes, conversion, 4) == 4 * (16 + 4 * 16 + 6 * 16)
    # Three 2 x 2 factors of a core, twice.
    assert sharded_event_bytes(shapes, Phase(1, 1, "update", {"a": 2}, {"a": 1}), 4) == 4 * 24
