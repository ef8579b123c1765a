"""Sizes, fonts and colours of all figures: ready for a paper's column, readable by the colour-blind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec

import numpy as np

from hpc_oialr.errors import ConfigError, MissingExtraError
from hpc_oialr.outputs import claim, marked, new_file

try:
    import matplotlib
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
except ImportError as error:
    raise MissingExtraError("matplotlib", "plot", purpose="A figure") from error

Width = Literal["single", "double"]
# Widths of a column and of a page in inches, as most two-column styles have them.
WIDTH_IN = {"single": 3.4, "double": 7.0}
FORMATS = (".png", ".pdf", ".svg")
# Up to so many layers a legend names each; beyond, a colour bar shows the depth.
NAMED = 6

# Okabe and Ito, Color universal design (2008); yellow is left out, it is too light for a line.
BLACK, GREY = "#000000", "#767676"
ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
MARKERS = "osD^vPX"

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.5,
    # TrueType inside the PDF: text stays text, and publishers accept it.
    "pdf.fonttype": 42,
    # An SVG cannot hold a font: outlines look the same everywhere.
    "svg.fonttype": "path",
    "savefig.dpi": 300,
}

P = ParamSpec("P")


def in_style(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw under these settings, whatever the reader's own are."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(), matplotlib.style.context(["default", STYLE]):
            return draw(*args, **kwargs)

    return drawn


def new_figure(width: Width, *, height: float = 0.62, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of a column's or a page's width, and its axes.

    Parameters
    ----------
    height
        Of the figure, over the width of a column.
    columns
        Axes side by side.
    """
    if width not in WIDTH_IN:
        raise ConfigError("width", width, f"must be one of {', '.join(WIDTH_IN)}")
    figure = Figure(figsize=(WIDTH_IN[width], height * WIDTH_IN["single"]), layout="constrained")
    return figure, figure.subplots(ncols=columns, **options)


FIGURE = marked("a figure", b"\x89PNG", b"%PDF", b"<?xml", mark=b"hpc_oialr")


def save(figure: Figure, path: Path | str, *, inputs: Sequence[Path | str] = (), force: bool = False) -> Path:
    """Write PNG, PDF or SVG, by the suffix; whole or not at all.

    Parameters
    ----------
    inputs, force
        As for :func:`hpc_oialr.outputs.claim`.

    Raises
    ------
    OutputError
        If the path holds something else than an earlier figure.
    ConfigError
        For another suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ConfigError("--out", str(path), f"must end in {', '.join(FORMATS)}", fix="E.g. stability.pdf.")
    # The mark by which an earlier figure is known. Dates would make two drawings of the same run differ.
    metadata: dict[str, dict[str, str | None]] = {
        ".png": {"Software": "hpc_oialr"},
        ".pdf": {"Creator": "hpc_oialr", "CreationDate": None},
        ".svg": {"Creator": "hpc_oialr", "Date": None},
    }
    with (
        new_file(claim(path, FIGURE, inputs=inputs, force=force)) as draft,
        matplotlib.rc_context({**STYLE, "svg.hashsalt": "hpc_oialr"}),
    ):
        figure.savefig(draft, metadata=metadata[path.suffix.lower()])
    return path


def with_grid(axes: Axes) -> Axes:
    """Faint lines that help to read values off."""
    axes.grid(visible=True, color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    return axes


def plain_log_ticks(axis: Axis, *, factor: float = 1) -> None:
    """Ticks at 1, 2, 5, 10 ... written out, of the values times ``factor``; powers beyond five decades."""
    low, high = sorted(axis.get_view_interval())
    if low > 0 and high / low > 1e5:
        return
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{factor * value:g}"))
    axis.set_minor_formatter(NullFormatter())


def depth_map() -> LinearSegmentedColormap:
    """Viridis without its lightest end, which is lost on white paper."""
    kept = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 231))
    return LinearSegmentedColormap.from_list("depth", kept)


def depth_colours(count: int) -> list[tuple[float, ...]]:
    """A colour for each of ``count`` layers, first to last."""
    shades = depth_map()
    return [shades(i / max(1, count - 1)) for i in range(count)]


def explain_depth(figure: Figure, axes: Axes, names: Sequence[str]) -> None:
    """A legend for few layers, a colour bar for many."""
    if len(names) <= NAMED:
        axes.legend(loc="best")
        return
    scale = ScalarMappable(Normalize(1, len(names)), depth_map())
    bar = figure.colorbar(scale, ax=axes, label="depth (layer)", pad=0.02, aspect=25)
    bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    bar.outline.set_visible(False)
