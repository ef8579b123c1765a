"""Singular values of one layer from event to event, with what was cut and what is noise."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hpc_oialr.report.figure_data import spread
from hpc_oialr.report.plots.style import (
    BLACK,
    VERMILION,
    Width,
    depth_map,
    in_style,
    new_figure,
    plain_log_ticks,
    with_grid,
)
from hpc_oialr.spectra import Layer

# More lines than these cannot be told apart.
LINES = 40


@in_style
def waterfall(layer: Layer, *, width: Width = "single") -> Figure:
    """Spectra coloured by step, early ones dark; the cutoff and the noise edge of every event.

    Cutoff: the smallest value that was kept, at events that cut. Noise edge: the height that noise alone would
    reach, drawn where the spectrum passes it.
    """
    figure, axes = new_figure(width, height=0.72)
    rows = spread(len(layer), LINES)
    scale = Normalize(int(layer.t[rows[0]]), int(layer.t[rows[-1]]))
    for row in rows:
        s = layer.spectrum(int(row))
        colour = depth_map()(scale(layer.t[row]))
        axes.plot(np.arange(1, len(s) + 1), s, color=colour, linewidth=0.7)
    cut = [int(row) for row in rows if layer["cut_values"][row] > 0]
    if cut:
        r = [int(layer.r[row]) for row in cut]
        kept = [float(layer.spectrum(row)[at - 1]) for row, at in zip(cut, r, strict=True)]
        axes.plot(r, kept, "o", color=VERMILION, markersize=3, label="cutoff", zorder=3)
    known = rows[np.isfinite(layer["noise_edge"][rows])]
    if len(known):
        above, edge = np.maximum(layer["values_above_edge"][known], 1), layer["noise_edge"][known]
        axes.plot(
            above, edge, "_", color=BLACK, markersize=4, markeredgewidth=0.8, label="noise edge", zorder=3
        )
    _finish(figure, axes, scale)
    return figure


def _finish(figure: Figure, axes: Axes, scale: Normalize) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        plain_log_ticks(axis)
    axes.set_xlabel("index $i$")
    axes.set_ylabel("singular value $s_i$")
    with_grid(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left")
    bar = figure.colorbar(ScalarMappable(scale, depth_map()), ax=axes, label="step", pad=0.02, aspect=25)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    bar.outline.set_visible(False)
