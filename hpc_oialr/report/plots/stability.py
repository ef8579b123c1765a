"""Stability of every layer over training: the first figure of arXiv 2401.08505."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hpc_oialr.report.figure_data import conversions
from hpc_oialr.report.plots.style import (
    GREY,
    Width,
    depth_colours,
    explain_depth,
    in_style,
    new_figure,
    with_grid,
)
from hpc_oialr.spectra import Layer, Spectra


@in_style
def stability(run: Spectra, *, width: Width = "single", title: str | None = None) -> Figure:
    """One line a layer, coloured by depth; the conversion to low rank is marked.

    Parameters
    ----------
    run
        The record; also of a run that trained dense throughout.
    width
        "single" column or "double".
    title
        Above the axes; none in a paper, whose caption says it.

    Examples
    --------
    ::

        with hpc_oialr.spectra.open("runs/first") as run:
            save(stability(run, width="double"), "stability.pdf")
    """
    figure, axes = new_figure(width, height=0.62 if width == "single" else 0.85)
    layers = list(run.values())
    thin = 1.0 if len(layers) <= 40 else 0.5
    for layer, colour in zip(layers, depth_colours(len(layers)), strict=True):
        known = np.isfinite(layer.stability)
        axes.plot(layer.t[known], layer.stability[known], color=colour, linewidth=thin, label=layer.name)
    _mark_conversions(axes, layers)
    with_grid(axes)
    axes.set_xlabel("step")
    axes.set_ylabel("stability")
    axes.set_ylim(*_limits(run))
    if title:
        axes.set_title(title)
    explain_depth(figure, axes, run.layers)
    return figure


def _mark_conversions(axes: Axes, layers: list[Layer]) -> None:
    """One line for all, or a band from the first to the last."""
    steps = conversions(layers)
    if not steps:
        return
    if steps[0] == steps[-1]:
        axes.axvline(steps[0], color=GREY, linestyle="--", linewidth=0.8)
    else:
        axes.axvspan(steps[0], steps[-1], color=GREY, alpha=0.15, linewidth=0)
    axes.annotate(
        "conversion",
        (steps[-1], 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(2, 0),
        textcoords="offset points",
        color=GREY,
        fontsize=7,
    )


def _limits(run: Spectra) -> tuple[float, float]:
    """The whole range from 0; less of it where all layers are stable and only the rest tells them apart."""
    values = run.events["stability"]
    lowest = float(np.min(values, where=np.isfinite(values), initial=1.0))
    bottom = lowest - 0.1 * (1 - lowest) if lowest > 0.5 else min(0.0, lowest - 0.02)
    return bottom, 1 + 0.03 * (1 - bottom)
