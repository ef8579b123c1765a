"""Time and memory against the dense run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpc_oialr.report.figure_data import FIGURES, ratios_to_dense, step_seconds
from hpc_oialr.report.plots.style import COLOURS, GREY, Width, in_style, new_figure, with_grid
from hpc_oialr.report.runs import Run, dense_of

# Keeps a number readable where it stands on a line.
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}


@in_style
def cost(runs: Sequence[Run], *, width: Width = "double") -> Figure:
    """Left the time of a step over training, right what each run cost over what the dense one did.

    Parameters
    ----------
    runs
        Finished runs, one of them dense.

    Raises
    ------
    DataError
        Without a dense run or another one, or if one has not ended.
    """
    ratios = ratios_to_dense(runs)
    dense = dense_of(runs)
    assert dense is not None
    side_by_side = width == "double"
    shape = {} if side_by_side else {"nrows": 2}
    figure, (times, bars) = new_figure(
        width, height=0.7 if side_by_side else 1.3, columns=2 if side_by_side else 1, **shape
    )
    for number, run in enumerate([dense, *(run for run in runs if run is not dense)]):
        middle, seconds = step_seconds(run)
        times.plot(middle, 1e3 * seconds, color=COLOURS[number % len(COLOURS)], label=run.name)
    with_grid(times).set_ylim(bottom=0)
    times.set_xlabel("step")
    times.set_ylabel("time of a step (ms)")
    times.legend(loc="best")
    _bars(bars, ratios)
    return figure


def _bars(axes: Axes, ratios: dict[str, dict[str, float]]) -> None:
    labels = [label for label, _ in FIGURES]
    thickness = 0.8 / len(ratios)
    for number, (name, values) in enumerate(ratios.items()):
        places = np.arange(len(labels)) + thickness * (number + 0.5) - 0.4
        colour = COLOURS[(number + 1) % len(COLOURS)]
        drawn = axes.barh(
            places, [values[label] for label in labels], 0.9 * thickness, color=colour, label=name
        )
        axes.bar_label(drawn, fmt="%.3g", padding=2, fontsize=7, bbox=PAPER)
    axes.axvline(1, color=GREY, linestyle="--", linewidth=0.8)
    axes.set_yticks(np.arange(len(labels)), labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("relative to dense (dashed)")
    if len(ratios) > 1:
        axes.legend(loc="best")
