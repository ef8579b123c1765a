"""Figures for papers, by matplotlib (extra ``plot``): ready for a paper's column, readable by the colour-blind.

``stability(run, width="double")`` gives a :class:`matplotlib.figure.Figure`; :func:`save` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hpc_oialr.errors import ConfigError, DataError, MissingExtraError
from hpc_oialr.outputs import claim, marked, new_file
from hpc_oialr.report.runs import Run, conversions, share_of_k, spread
from hpc_oialr.spectra import Layer, Spectra

try:
    import matplotlib
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
except ImportError as error:
    raise MissingExtraError("matplotlib", "plot", purpose="A figure") from error

Width = Literal["single", "double"]
# Widths of a column and of a page in inches, as most two-column styles have them.
WIDTH_IN = {"single": 3.4, "double": 7.0}

# Okabe and Ito, Color universal design (2008); yellow is left out, it is too light for a line.
BLACK, GREY, VERMILION = "#000000", "#767676", "#D55E00"
STYLE = str(resources.files(__package__) / "assets" / "paper.mplstyle")
# Viridis without its lightest end, which is lost on white paper.
SHADES = LinearSegmentedColormap.from_list("depth", matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 231)))

# Decorator of the drawing functions: this style, whatever the user's own settings are.
in_style = matplotlib.style.context(["default", STYLE])


def new_figure(width: Width, *, height: float = 0.62, **subplots: Any) -> tuple[Figure, Any]:
    """A figure of a column's or a page's width, ``height`` times as high as a column is wide, and its axes."""
    if width not in WIDTH_IN:
        raise ConfigError("width", width, f"must be one of {', '.join(WIDTH_IN)}")
    figure = Figure(figsize=(WIDTH_IN[width], height * WIDTH_IN["single"]), layout="constrained")
    return figure, figure.subplots(**subplots)


FIGURE = marked("a figure", b"\x89PNG", b"%PDF", b"<?xml", mark=b"hpc_oialr")
# Identifies earlier figures. No dates: two drawings of one run must be identical.
METADATA: dict[str, dict[str, str | None]] = {
    ".png": {"Software": "hpc_oialr"},
    ".pdf": {"Creator": "hpc_oialr", "CreationDate": None},
    ".svg": {"Creator": "hpc_oialr", "Date": None},
}


def save(figure: Figure, path: Path | str, *, inputs: Sequence[Path | str] = (), force: bool = False) -> Path:
    """Write PNG, PDF or SVG, by the suffix, atomically.

    ``inputs`` and ``force`` are those of :func:`hpc_oialr.outputs.claim`. Raises OutputError if the path holds
    anything but an earlier figure, and ConfigError for another suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in METADATA:
        raise ConfigError("--out", str(path), f"must end in {', '.join(METADATA)}", fix="E.g. stability.pdf.")
    target = claim(path, FIGURE, inputs=inputs, force=force)
    with new_file(target) as draft, matplotlib.style.context(STYLE):
        figure.savefig(draft, metadata=METADATA[path.suffix.lower()])
    return path


def with_grid(axes: Axes) -> Axes:
    """Faint grid lines behind the data."""
    axes.grid(visible=True, color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    return axes


def plain_log_ticks(axis: Axis) -> None:
    """Ticks at 1, 2, 5, 10 ... written out; powers beyond five decades."""
    low, high = sorted(axis.get_view_interval())
    if low > 0 and high / low > 1e5:
        return
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def colour_bar(figure: Figure, axes: Axes, shown: ScalarMappable, label: str) -> Axis:
    """A narrow bar beside the axes; returns its axis."""
    bar = figure.colorbar(shown, ax=axes, label=label, pad=0.02, aspect=25)
    bar.outline.set_visible(False)
    return bar.ax.yaxis


@in_style
def stability(run: Spectra, *, width: Width = "single") -> Figure:
    """Stability of every layer over training, coloured by depth, and the conversion; figure 1 of arXiv 2401.08505."""
    figure, axes = new_figure(width, height=0.62 if width == "single" else 0.85)
    layers = list(run.values())
    for number, layer in enumerate(layers):
        known, colour = np.isfinite(layer.stability), SHADES(number / max(1, len(layers) - 1))
        thin = 1.0 if len(layers) <= 40 else 0.5
        axes.plot(layer.t[known], layer.stability[known], color=colour, linewidth=thin, label=layer.name)
    if converted := conversions(layers):
        # One line if all layers were converted at once, or a band from the first step to the last.
        first, last = converted[0], converted[-1]
        if first == last:
            axes.axvline(first, color=GREY, linestyle="--", linewidth=0.8)
        else:
            axes.axvspan(first, last, color=GREY, alpha=0.15, linewidth=0)
        place = {"xycoords": ("data", "axes fraction"), "xytext": (2, 0), "textcoords": "offset points"}
        axes.annotate("conversion", (last, 0.02), **place, color=GREY, fontsize=7)
    with_grid(axes)
    # The whole range from 0; less of it where all layers are stable and only the rest tells them apart.
    values = run.events["stability"]
    lowest = float(np.min(values, where=np.isfinite(values), initial=1.0))
    bottom = lowest - 0.1 * (1 - lowest) if lowest > 0.5 else min(0.0, lowest - 0.02)
    axes.set(xlabel="step", ylabel="stability", ylim=(bottom, 1 + 0.03 * (1 - bottom)))
    if len(layers) <= 6:
        axes.legend(loc="best")
    else:
        bar = colour_bar(figure, axes, ScalarMappable(Normalize(1, len(layers)), SHADES), "depth (layer)")
        bar.set_major_locator(MaxNLocator(6, integer=True))
    return figure


@in_style
def inner_dimension(run: Spectra, *, width: Width = "single", last_step: int | None = None) -> Figure:
    """Heat map of r over k by layer and step, from the dense beginning (1) to ``last_step``, where the run ended."""
    edges, shares = share_of_k(run, last_step)
    figure, axes = new_figure(width, height=float(np.clip(0.25 + 0.032 * len(run), 0.5, 1.35)))
    rows = np.arange(len(run) + 1) + 0.5
    # Rasterised inside a PDF: 100,000 rectangles would take seconds to show.
    mesh = axes.pcolormesh(edges, rows, shares, vmin=0, vmax=1, cmap="cividis", rasterized=True)
    axes.set_xlabel("step")
    axes.invert_yaxis()
    if len(run) <= 40:
        # The end of a long name: there the names of one model differ.
        most = 26 if width == "single" else 60
        names = [name if len(name) <= most else f"\N{HORIZONTAL ELLIPSIS}{name[1 - most :]}" for name in run]
        axes.set_yticks(np.arange(len(run)) + 1, names)
        axes.tick_params(axis="y", length=0, labelsize=6 if len(run) <= 30 else 5)
    else:
        axes.set_ylabel("depth (layer)")
        axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    colour_bar(figure, axes, mesh, "$r\\,/\\,k$").set_major_formatter(PercentFormatter(1.0, decimals=0))
    return figure


@in_style
def waterfall(layer: Layer, *, width: Width = "single") -> Figure:
    """Spectra of one layer coloured by step, early ones dark; the cutoff and the noise edge of every event.

    Cutoff: the smallest value that was kept, at events that cut. Noise edge: the height that noise alone would
    reach, drawn where the spectrum passes it.
    """
    figure, axes = new_figure(width, height=0.72)
    # More than 40 lines cannot be distinguished.
    rows = spread(len(layer), 40)
    scale = Normalize(int(layer.t[rows[0]]), int(layer.t[rows[-1]]))
    for row in rows:
        s = layer.spectrum(int(row))
        axes.plot(np.arange(1, len(s) + 1), s, color=SHADES(scale(layer.t[row])), linewidth=0.7)
    cut = [int(row) for row in rows if layer["cut_values"][row] > 0]
    if cut:
        r = [int(layer.r[row]) for row in cut]
        kept = [float(layer.spectrum(row)[at - 1]) for row, at in zip(cut, r, strict=True)]
        axes.plot(r, kept, "o", color=VERMILION, markersize=3, label="cutoff", zorder=3)
    known = rows[np.isfinite(layer["noise_edge"][rows])]
    if len(known):
        above, edge = np.maximum(layer["values_above_edge"][known], 1), layer["noise_edge"][known]
        style = {"color": BLACK, "markersize": 4, "markeredgewidth": 0.8}
        axes.plot(above, edge, "_", **style, label="noise edge", zorder=3)
    axes.set(xlabel="index $i$", ylabel="singular value $s_i$", xscale="log", yscale="log")
    plain_log_ticks(axes.xaxis)
    plain_log_ticks(axes.yaxis)
    with_grid(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower left")
    bar = colour_bar(figure, axes, ScalarMappable(scale, SHADES), "step")
    bar.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def figure_of(name: str, run: Run, *, layer: str | None, width: Width) -> Figure:
    """The figure "stability", "r" or "waterfall"; ``layer`` is that of a waterfall, default the first one.

    Raises UnknownNameError for another layer, and DataError if the run has recorded no spectra.
    """
    record = run.spectra
    if record is None or not len(record.events):
        raise DataError(
            f"{run.folder.path} has recorded no spectra; this figure shows them. Train with --record.spectra true."
        )
    if name == "stability":
        return stability(record, width=width)
    if name == "r":
        return inner_dimension(record, width=width, last_step=run.last_step)
    return waterfall(record[layer or record.layers[0]], width=width)
