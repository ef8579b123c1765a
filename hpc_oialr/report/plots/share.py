"""Share of trained parameters against the metric."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from hpc_oialr.report.plots.style import (
    COLOURS,
    MARKERS,
    Width,
    in_style,
    new_figure,
    plain_log_ticks,
    with_grid,
)
from hpc_oialr.report.runs import Run


@in_style
def share(runs: Sequence[Run], *, width: Width = "single") -> Figure:
    """One line a run, a point an evaluation; the last one is filled.

    Parameters
    ----------
    runs
        Runs with evaluations; a dense one stands at 100 %.
    """
    figure, axes = new_figure(width, height=0.7)
    names = {run.evaluations.name for run in runs if len(run.evaluations)}
    for number, run in enumerate(runs):
        curve, colour, marker = (
            run.evaluations,
            COLOURS[number % len(COLOURS)],
            MARKERS[number % len(MARKERS)],
        )
        if len(curve):
            style = {"markerfacecolor": "white", "markeredgewidth": 0.8, "label": run.name}
            axes.plot(curve.share, curve.value, color=colour, marker=marker, **style)
            axes.plot(curve.share[-1:], curve.value[-1:], color=colour, marker=marker, linestyle="none")
    with_grid(axes)
    axes.set_xscale("log")
    plain_log_ticks(axes.xaxis, factor=100)
    axes.set_xlabel("trained parameters (% of dense)")
    # Training goes from many to few: so does the axis.
    axes.invert_xaxis()
    name_metric(axes, sorted(names))
    axes.legend(loc="best")
    return figure


def name_metric(axes: Axes, names: Sequence[str]) -> None:
    """Name the y axis; accuracies in per cent."""
    name = " / ".join(names) or "metric"
    accuracy = name.endswith("accuracy")
    axes.set_ylabel(f"{name} (%)" if accuracy else name)
    if accuracy:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
