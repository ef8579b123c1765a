"""Fine-tuning methods at about equal numbers of trained parameters."""

from __future__ import annotations

import textwrap

import numpy as np

from benchmarks.pages.tables import load, origin, table


def finetune() -> str:
    """Test accuracy of each method at its own best learning rate, and how far chance goes."""
    result = load("finetune")
    measured, samples = result["rows"], result["test_samples"]
    rows, loads, variances, means = [], [], [], []
    for name in dict.fromkeys(row["method"] for row in measured):
        mine = [row for row in measured if row["method"] == name and row["lr"] == result["best_lr"][name]]
        accuracies, head = [100 * row["test_accuracy"] for row in mine], result["head_parameters"]
        variances.append(np.var(accuracies, ddof=1))
        means.append(float(np.mean(accuracies)))
        error = (variances[-1] / len(mine)) ** 0.5
        rates = sorted({row["lr"] for row in measured if row["method"] == name})
        edge = " (end of its range)" if mine[0]["lr"] in (rates[0], rates[-1]) else ""
        rows.append((
            name,
            f"{mine[0]['trained'] - head:,}",
            f"{mine[0]['lr']:g}{edge}",
            f"{np.mean([100 * row['validation_accuracy'] for row in mine]):.1f} %",
            f"{means[-1]:.1f} +- {error:.1f} %",
            f"{np.mean([row['cpu_s'] for row in mine]):.0f} s",
        ))  # fmt: skip
        loads += [(row["load_min"], row["load_max"]) for row in mine if "load_min" in row]
    share = float(np.mean([row["test_accuracy"] for row in measured]))
    spread = 100 * (share * (1 - share) / samples) ** 0.5
    apart = 2 * (2 * np.mean(variances) / len(mine)) ** 0.5
    gap = max(means) - min(means)
    verdict = f"The best and the worst method are {gap:.1f} points apart: "
    verdict += "no order can be told." if gap < apart else "these two differ."
    low, high = min(pair[0] for pair in loads), max(pair[1] for pair in loads)
    remark = (
        f"Trained parameters are those beside the head's {result['head_parameters']:,}, which every method trains. +- is "
        f"the standard error over {len(mine)} seeds; two methods that are less than {apart:.1f} points apart (two "
        "standard errors of a difference, the variance pooled over the methods) may be equal. All methods are tested on "
        f"the same {samples:,} passages; which ones were drawn adds about {spread:.1f} points to every figure, much of "
        f"it in common. {verdict} Each of Mo-SARA's experts has between {low:.2f} and {high:.2f} of its layer's gates."
    )
    header = ("method", "trained", "learning rate", "validation accuracy", "test accuracy", "CPU time of a run")
    return f"{table(header, rows)}\n\n{textwrap.fill(remark, 118)}\n{origin('finetune', result['environment'])}"
