"""Figures of an operator's functions: states in the plane, or singular values beside the exact ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from hpc_oialr.report.plots import BLACK, VERMILION, in_style, new_figure, with_grid


@in_style
def states(values: NDArray[np.float64], titles: Sequence[str], half_width: float) -> Figure:
    """A picture for each function, blue where it is negative and red where it is positive.

    ``values`` are L x n x n, on a grid of x and y from ``-half_width`` to ``half_width``.
    """
    columns = min(5, len(values))
    rows = math.ceil(len(values) / columns)
    figure, axes = new_figure("double", height=0.45 * rows, nrows=rows, ncols=columns, squeeze=False)
    extent = (-half_width, half_width, -half_width, half_width)
    for place in axes.flat[len(values) :]:
        place.remove()
    for place, function, title in zip(axes.flat, values, titles, strict=False):
        most = float(np.abs(function).max()) or 1.0
        place.imshow(function, origin="lower", extent=extent, cmap="RdBu_r", vmin=-most, vmax=most)
        place.set_title(title, fontsize=7)
        place.set(xticks=[], yticks=[])
    return figure


@in_style
def singular_values(found: Sequence[float], exact: Sequence[float], alignments: Sequence[float]) -> Figure:
    """Singular values over their number, and each pair's alignment with the exact vectors."""
    figure, (left, right) = new_figure("double", height=0.7, ncols=2)
    number = np.arange(1, len(found) + 1)
    left.plot(number, exact, "-", color=BLACK, label="exact")
    left.plot(number, found, "o", color=VERMILION, label="found")
    left.set(xlabel="number", ylabel="singular value")
    left.legend()
    right.plot(number, alignments, "o", color=VERMILION)
    right.set(xlabel="number", ylabel="alignment", ylim=(0, 1.05))
    for axes in (left, right):
        with_grid(axes)
    return figure
