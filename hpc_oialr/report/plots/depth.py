"""Layers by depth: one colour each, and what tells the reader which is which."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Up to so many layers a legend names each; beyond, a colour bar shows the depth.
NAMED = 6


def depth_map() -> LinearSegmentedColormap:
    """Viridis without its lightest end, which is lost on white paper."""
    kept = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 231))
    return LinearSegmentedColormap.from_list("depth", kept)


def colours(count: int) -> list[tuple[float, ...]]:
    """A colour for each of ``count`` layers, first to last."""
    shades = depth_map()
    return [shades(i / max(1, count - 1)) for i in range(count)]


def explain(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """A legend for few layers, a colour bar for many."""
    if len(names) <= NAMED:
        axes.legend(loc="best")
        return
    scale = ScalarMappable(Normalize(1, len(names)), depth_map())
    bar = figure.colorbar(scale, ax=axes, label="depth (layer)", pad=0.02, aspect=25)
    bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    bar.outline.set_visible(False)
