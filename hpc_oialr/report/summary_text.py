"""What the numbers of a run say, in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from hpc_oialr.report.figure_data import conversions, settling_steps
from hpc_oialr.report.runs import Run, dense_of
from hpc_oialr.spectra import Spectra

STABLE = 0.95


def sentences(runs: Sequence[Run]) -> Iterator[str]:
    """One after the other; only what was recorded is told."""
    dense = dense_of(runs)
    for run in runs:
        yield _result(run)
        if dense is not None and run is not dense and run.summary and dense.summary:
            yield _against(run, dense)
        if run.spectra is not None and len(run.spectra.events):
            yield from _stability(run.name, run.spectra)
            yield from _inner_dimensions(run.name, run.spectra)
            yield from _noise(run.name, run.spectra)


def metric_text(value: float, name: str) -> str:
    """Accuracies in per cent.

    Examples
    --------
    >>> metric_text(0.8929, "test_accuracy"), metric_text(1.25, "test_loss")
    ('89.29 %', '1.2500')
    """
    return f"{100 * value:.2f} %" if name.endswith("accuracy") else f"{value:.4f}"


def _result(run: Run) -> str:
    summary = run.summary
    if not run.folder.holds_run:
        return f"{run.name} is a record of spectra alone, up to step {run.last_step:,}."
    if not summary:
        return f"{run.name} has not ended: {run.last_step:,} steps so far."
    metric, share = summary["metric_name"], summary["trainable_params"] / summary["dense_trainable_params"]
    return (
        f"{run.name}: {metric.replace('_', ' ')} {metric_text(summary['metric'], metric)} after "
        f"{summary['steps']:,} steps and {summary['wall_s']:.0f} s of training; {share:.1%} of the parameters "
        "are trained at the end."
    )


def _against(run: Run, dense: Run) -> str:
    own, other, curve = run.summary, dense.summary, dense.evaluations
    text = (
        f"Against {dense.name}, {run.name} took {own['wall_s'] / other['wall_s']:.2f} of the time and "
        f"{own['peak_memory_gib'] / other['peak_memory_gib']:.2f} of the peak memory"
    )
    if not len(curve):
        return text + "."
    name = own["metric_name"]
    text += f", and ended at {metric_text(own['metric'], name)} where {dense.name} ended at "
    text += metric_text(other["metric"], name)
    if own["wall_s"] < curve.wall_s[0]:
        return f"{text}, which had not been evaluated after the same time."
    at = float(np.interp(own["wall_s"], curve.wall_s, curve.value))
    return f"{text} and stood at {metric_text(at, name)} after the same time."


def _stability(name: str, record: Spectra) -> Iterator[str]:
    settled = settling_steps(record, STABLE)
    if not settled:
        return
    steps = sorted(step for step in settled.values() if math.isfinite(step))
    if not steps:
        yield f"In {name}, the stability of no layer stays above {STABLE:g}."
        return
    # The slowest tenth of the layers would hide when the others settle.
    enough = math.ceil(0.9 * len(steps))
    enough += sum(step == steps[enough - 1] for step in steps[enough:])
    rest, count = "", len(settled)
    if len(steps) < count:
        never = [each for each, step in settled.items() if not math.isfinite(step)]
        more = f" and {len(never) - 1} more" if len(never) > 1 else ""
        rest = f"; that of {never[0]}{more} does not by the end"
    elif len(steps) > enough:
        rest = f", of all from step {steps[-1]:,.0f} on"
    who = (
        f"{enough} of {count} layers"
        if enough < count
        else f"all {count} layers"
        if count > 1
        else "its layer"
    )
    yield f"In {name}, the stability of {who} stays above {STABLE:g} from step {steps[enough - 1]:,.0f} on{rest}."


def _inner_dimensions(name: str, record: Spectra) -> Iterator[str]:
    converted = conversions(record.values())
    if not converted:
        return
    shares = {layer.name: layer.r[-1] / layer.k for layer in record.values() if len(layer)}
    least = min(shares, key=lambda each: shares[each])
    when = f"at step {converted[0]:,}"
    if converted[-1] > converted[0]:
        when = f"from step {converted[0]:,} to {converted[-1]:,}"
    least_text = f", least in {least} ({shares[least]:.1%})" if len(set(shares.values())) > 1 else ""
    yield (
        f"{name} was converted {when}; r is {np.mean(list(shares.values())):.1%} of k at the end in the mean of its "
        f"{len(shares)} layer{'s' * (len(shares) > 1)}{least_text}."
    )


def _noise(name: str, record: Spectra) -> Iterator[str]:
    above = [
        layer["values_above_edge"][-1] / layer["r_before"][-1] for layer in record.values() if len(layer)
    ]
    known = [share for share in above if math.isfinite(share)]
    if known:
        yield (
            f"At the last event of each layer in {name}, {np.median(known):.0%} of its singular values (median) stand "
            "above the edge that noise alone would reach."
        )
