"""Whole training steps in bf16, by autocast or on casts of parameters: dense and low-rank, AdamW and Muon, in every way.

One model is alive at a time. The dense model is measured before and after its low-rank twins: the distance of the
two is the drift of the machine. ``tflop`` counts the products and attentions of forward and backward as they are
run, so ``mfu`` is to this model's own work and the measured rate of 8192^3 bf16 products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.common import Row
from benchmarks.gpu import counts
from benchmarks.gpu.card import peaks
from benchmarks.gpu.execution import MODES, Step, Trainee, make_optimizer
from benchmarks.gpu.models import Workload, batch_on, on_device, to_low_rank, workloads
from benchmarks.gpu.runner import Case, Context
from benchmarks.gpu.timing import timed
from hpc_oialr import trainable_parameters

ORDER = ("ViT-B/16", "mini ViT", "Llama-like 350M", "GPT-2 124M")
# (optimizer, mode, r / k): the most telling first.
ROUNDS: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("AdamW", "bf16 params, compiled blocks, cuda graph", (0.25,)),
    ("AdamW", "bf16 params, cuda graph", (0.25,)),
    ("Muon", "bf16 params, cuda graph", (0.25,)),
    ("AdamW", "eager", (0.25,)),
    ("AdamW", "bf16 params, compiled blocks", (0.25,)),
    ("AdamW", "cuda graph", (0.25,)),
    ("AdamW", "bf16 params, compiled blocks, cuda graph", (0.5, 0.125)),
    ("AdamW", "compiled blocks", (0.25,)),
    ("AdamW", "bf16 params", (0.25,)),
    ("Muon", "eager", (0.25,)),
    ("Muon", "cuda graph", (0.25,)),
)


@dataclass(frozen=True)
class Setting:
    """What one row measures; ``fraction`` is r over k, None for the dense model."""

    workload: Workload
    optimizer: str
    mode: str
    fraction: float | None


def cases(context: Context) -> Sequence[Case]:
    """One case for each round and model."""
    models, found = workloads(tiny=context.tiny), []
    for turn, (optimizer, mode, fractions) in enumerate(ROUNDS[:9] if context.tiny else ROUNDS):
        # In the tiny size every model once, and every optimizer and mode with the last of them.
        for name in ORDER if turn == 0 or not context.tiny else ORDER[-1:]:
            fractions = fractions[:1] if context.tiny else fractions
            measured = partial(measure_round, models[name], optimizer, mode, fractions, context)
            found.append(Case(f"{name}, {optimizer}, {mode}, r/k = {', '.join(map(str, fractions))}", measured))
    return found


def measure_round(
    workload: Workload, optimizer: str, mode: str, fractions: Sequence[float], context: Context
) -> Iterator[Row]:
    """Dense, every fraction, dense again; ratios are to the first dense row, the second one tells the drift.

    Compiled code is not made again for that.
    """
    dense = measure(Setting(workload, optimizer, mode, None), context)
    yield dense
    for fraction in fractions:
        row = measure(Setting(workload, optimizer, mode, fraction), context)
        ratios = {"time_ratio": row["ms"] / dense["ms"], "operation_ratio": row["tflop"] / dense["tflop"]}
        yield row | ratios
    if "compiled" in mode:
        return
    again = measure(Setting(workload, optimizer, mode, None), context, again=True)
    yield again | {"drift": again["ms"] / dense["ms"] - 1}


def measure(setting: Setting, context: Context, *, again: bool = False) -> Row:
    """One model, alive only in here; what cannot drift is not counted ``again``."""
    device, workload = context.device, setting.workload
    held = counts.start_peak(device)
    trainee = make(setting, device)
    operations = counts.operations(trainee.gradients)
    trainee.optimizer.zero_grad(set_to_none=True)
    # From here on, not after a capture: what a graph holds is not allocated again when it is replayed.
    counts.start_peak(device)
    step, method = MODES[setting.mode](trainee)
    for _ in range(1 if context.tiny else 3):
        loss = step()
    timing = timed(step, device, in_a_row=2, seconds=0.01 if context.tiny else 1.0)
    peak = counts.peak_gib(device)
    tflop_per_s = operations / timing.ms / 1e9
    row: Row = {
        "model": workload.name,
        "optimizer": setting.optimizer,
        "mode": setting.mode,
        "method": method,
        "r_over_k": setting.fraction,
        "ms": timing.ms,
        "spread": timing.spread,
        "samples_per_s": 1e3 * workload.samples / timing.ms,
        "tokens_per_s": 1e3 * workload.tokens / timing.ms,
        "tflop": operations / 1e12,
        "tflop_per_s": tflop_per_s,
        "mfu": tflop_per_s / peaks(device, context.tiny).tflop_per_s,
        "peak_gib": peak,
        "held_before_gib": held,
        "trained": trainable_parameters(trainee.model),
        "finite": bool(torch.isfinite(loss)) if isinstance(loss, torch.Tensor) else None,
        "repeated": again,
    }
    row = row if again else row | _counted(step, device)
    if "compiled blocks" in setting.mode:
        # Compiled code may hold what it was compiled for.
        torch.compiler.reset()
    return row


def _counted(step: Step, device: torch.device) -> Row:
    row: Row = {"kernels": None, "synchronisations": None}
    # The times are measured: a profiler that cannot be had is no reason to lose them.
    try:
        with counts.synchronisations(device) as waits:
            step()
        row |= {"synchronisations": waits.count, "places": waits.places}
        row["kernels"], row["kernel_ms"] = counts.kernels(step, device)
    except Exception as error:
        row["not_counted"] = f"{type(error).__name__}: {str(error)[:200]}"
    return row


def make(setting: Setting, device: torch.device) -> Trainee:
    """Model, optimizer and batch on the device; at low rank if the setting says so."""
    workload = setting.workload
    model = on_device(workload, device)
    capturable = "cuda graph" in setting.mode and device.type == "cuda"
    optimizer = make_optimizer(setting.optimizer, model, workload.selection, capturable=capturable)
    controller = None
    if setting.fraction is not None:
        controller = to_low_rank(model, optimizer, setting.fraction, workload.selection)
    return Trainee(model, optimizer, batch_on(workload, device), device, controller, loss=workload.loss)
