"""Heat map of r by layer and step."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hpc_oialr.report.figure_data import share_of_k
from hpc_oialr.report.plots.style import Width, in_style, new_figure
from hpc_oialr.spectra import Spectra

# Up to so many layers each has its name beside its row.
NAMED = 40
NAME_LENGTH = {"single": 26, "double": 60}


@in_style
def inner_dimension(run: Spectra, *, width: Width = "single", last_step: int | None = None) -> Figure:
    """r over k of every layer, from its dense beginning (1) to the end.

    Parameters
    ----------
    last_step
        Where the run ended; default a little after the last event.
    """
    edges, shares = share_of_k(run, last_step)
    named = len(run) <= NAMED
    figure, axes = new_figure(width, height=float(np.clip(0.25 + 0.032 * len(run), 0.5, 1.35)))
    rows = np.arange(len(run) + 1) + 0.5
    # Rasterised inside a PDF: 100,000 rectangles would take seconds to show.
    mesh = axes.pcolormesh(edges, rows, shares, vmin=0, vmax=1, cmap="cividis", rasterized=True)
    axes.set_xlabel("step")
    axes.invert_yaxis()
    if named:
        axes.set_yticks(np.arange(len(run)) + 1, [_short(name, NAME_LENGTH[width]) for name in run.layers])
        axes.tick_params(axis="y", length=0, labelsize=6 if len(run) <= 30 else 5)
    else:
        axes.set_ylabel("depth (layer)")
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    bar = figure.colorbar(mesh, ax=axes, label="$r\\,/\\,k$", pad=0.02, aspect=25)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bar.outline.set_visible(False)
    return figure


def _short(name: str, length: int) -> str:
    """The end of a long name, which is where names of one model differ."""
    return name if len(name) <= length else f"\N{HORIZONTAL ELLIPSIS}{name[1 - length :]}"
