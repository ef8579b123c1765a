"""Tables of docs/method.md: which directions a cut keeps, which factors are trained, what is seen in noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.budgets import over_four_epochs
from benchmarks.pages.tables import load, origin, table


def bases_trained() -> str:
    """Which factors are trained, and when."""
    named = {
        "cores": "cores",
        "factors": "factors from the conversion on",
        "factors at the end": "cores, factors in the last 30 %",
        "factors in the middle": "factors from 30 % to 60 %, then cores",
        "cores, growing by 1/8": "cores, bases growing by an eighth (below) at every tenth of the run, r = .29 k",
    }
    result = load("bases_trained")
    rows = [
        (named[row["run"]], f"{100 * row['accuracy']:.1f}", f"{row['cpu_s']:.0f}", f"{row['trained_share']:.1%}")
        for row in result["rows"]
    ]
    header = ("trained", "accuracy", "processor seconds", "trained at the end")
    return table(header, rows) + "\n" + origin("bases_trained", result["environment"])


def bases_conversion() -> str:
    """Accuracy right after a conversion, by what the directions were chosen."""
    result = load("bases_conversion")
    ways = {
        ("weights", ""): "weights",
        ("inputs", "diagonal"): "inputs, diagonal",
        ("inputs", "full"): "inputs, full",
        ("inputs and gradients", "full"): "inputs and gradients, full",
    }
    found: dict[tuple[float, float], dict[str, str]] = {}
    before = {}
    for row in result["rows"]:
        cell = found.setdefault((row["delay"], row["fraction"]), {})
        cell[ways[row["importance"], row["moments"]]] = f"{row['accuracy_after']:.1f}"
        before[row["delay"]] = f"{row['accuracy_before']:.1f}"
    rows = []
    for (delay, fraction), cells in found.items():
        first = fraction == max(share for when, share in found if when == delay)
        head = (f"{20 * delay:g} epochs", before[delay]) if first else ("", "")
        rows.append((*head, f"k/{1 / fraction:g}", *(cells[way] for way in ways.values())))
    header = ("converted after", "before", "kept", *ways.values())
    return table(header, rows) + "\n" + origin("bases_conversion", result["environment"])


def bases_windows() -> str:
    """The same by inputs, gathered in fewer steps."""
    result = load("bases_windows")
    steps = list(dict.fromkeys(row["moments_steps"] for row in result["rows"]))
    rows = []
    for delay, fraction in dict.fromkeys((row["delay"], row["fraction"]) for row in result["rows"]):
        mine = [row for row in result["rows"] if (row["delay"], row["fraction"]) == (delay, fraction)]
        found = {row["moments_steps"]: f"{row['accuracy_after']:.1f} ({row['loss_after']:.3f})" for row in mine}
        before = f"{mine[0]['accuracy_before']:.1f} ({mine[0]['loss_before']:.3f})"
        rows.append((f"{20 * delay:g} epochs", before, f"k/{1 / fraction:g}", *(found[count] for count in steps)))
    header = ("converted after", "before", "kept", *(f"{count} step{'s' * (count > 1)}" for count in steps))
    return table(header, rows) + "\n" + origin("bases_windows", result["environment"])


def budgets_trials() -> str:
    """Settings tried in long runs; their steps' time for as many epochs of all training images, over dense training's."""
    result = load("budgets_trials")
    (dense,) = (row for row in load("budgets")["rows"] if row["run"] == "dense")
    rows = [
        (
            row["run"],
            f"{row['epochs']:g}",
            f"x {over_four_epochs(row, dense):.2f}",
            f"{100 * row['validation_accuracy']:.2f}",
            f"{100 * row['test_accuracy']:.2f}",
            f"{row['trained_share']:.1%}",
        )
        for row in result["rows"]
    ]
    header = ("run", "epochs", "CPU time over that of four dense epochs", "held-out images", "test images", "trained")
    return table(header, rows) + "\n" + origin("budgets_trials", result["environment"])


def bases_h100() -> str:
    """Accuracy at the end of runs of one length."""
    named = {
        "dense .005": "dense, Muon .005",
        "dense .01": "dense, Muon .01",
        "cores .3 weights": "cores at k/4, converted at 30 % of the run, by weights",
        "cores .3 inputs": "the same by inputs",
        "cores .3 both": "the same by inputs and gradients",
        "cores .3 inputs, free .7-1": "by inputs, bases trained again from 70 % on",
        "cores .3 inputs k/2": "by inputs, at k/2",
        "factors .3": "all factors from 30 % on, by weights",
        "factors .3 inputs": "the same by inputs",
        "factors b.001": "the same with a rate of .001 for bases",
        "cores .3 inputs, free .3-.6": "by inputs, bases trained from 30 to 60 %, then cores",
        "cores .1 weights": "cores at k/4, converted at 10 %, by weights",
        "cores .1 inputs": "the same by inputs",
        "cores .1 inputs, free .6-1": "the same, bases trained again from 60 % on",
    }
    result = load("bases_h100")
    by_name = {row["run"]: row for row in result["rows"]}
    rows = [
        (text, f"{100 * by_name[name]['accuracy']:.1f}", f"{by_name[name]['trained_share']:.1%}")
        for name, text in named.items()
    ]
    return table(("run", "accuracy", "trained at the end"), rows) + "\n" + origin("bases_h100", result["environment"])


def detection() -> str:
    """Simulated tensors of one component in noise, means over seeds and modes."""
    result = load("detection")
    rows = []
    for rho in dict.fromkeys(row["rho"] for row in result["rows"]):
        modes = [row for row in result["rows"] if row["rho"] == rho]
        mean = _means(modes)
        # Seen if it is seen in every mode.
        seen = min(row["detected"] for row in modes)
        rows.append((
            f"{rho:g}",
            f"{seen:.0%}".replace("%", " %"),
            f"{mean['eigenvalue']:.3f}",
            f"{mean['predicted']:.3f}",
            f"{mean['alignment']:.3f}",
            f"{mean['alignment_large']:.3f}, {mean['alignment_predicted']:.3f}",
            *(f"{mean[f'hooi_{sweep}']:.3f}" for sweep in (1, 2, 3)),
        ))  # fmt: skip
    header = (
        r"$\rho$", "detected", r"$\xi$", "predicted", "alignment, MLSVD", "predicted: large, this size",
        "HOOI, 1 sweep", "2", "3",
    )  # fmt: skip
    return table(header, rows) + "\n" + origin("detection", result["environment"])


def _means(rows: list[Mapping[str, Any]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
