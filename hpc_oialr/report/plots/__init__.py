"""Figures for papers, by matplotlib (extra ``plot``): one a file, each a function of a reader.

``stability(run, width="double")`` gives a :class:`matplotlib.figure.Figure`; :func:`save` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from hpc_oialr.errors import DataError, UnknownNameError
from hpc_oialr.report.plots.cost import cost
from hpc_oialr.report.plots.inner_dimension import inner_dimension
from hpc_oialr.report.plots.share import share
from hpc_oialr.report.plots.stability import stability
from hpc_oialr.report.plots.style import Width, save
from hpc_oialr.report.plots.waterfall import waterfall
from hpc_oialr.report.runs import Run

__all__ = ["NAMES", "cost", "figure_of", "inner_dimension", "save", "share", "stability", "waterfall"]

OF_RUNS: dict[str, Callable[..., Figure]] = {"share": share, "cost": cost}
NAMES = ("stability", "r", "waterfall", *OF_RUNS)


def figure_of(name: str, runs: Sequence[Run], *, layer: str | None, width: Width) -> Figure:
    """One of :data:`NAMES`.

    Parameters
    ----------
    layer
        Of a waterfall; default the first one.

    Raises
    ------
    UnknownNameError
        For another name, or a layer that is not there.
    DataError
        If the runs do not hold what it shows.
    """
    if name in OF_RUNS:
        return OF_RUNS[name](runs, width=width)
    if name not in NAMES:
        raise UnknownNameError("figure", name, NAMES)
    if len(runs) > 1:
        paths = ", ".join(str(run.folder.path) for run in runs)
        raise DataError(f"there are {len(runs)} runs ({paths}); figure {name} shows one. Name one of them.")
    run, record = runs[0], runs[0].spectra
    if record is None or not len(record.events):
        raise DataError(
            f"{run.folder.path} has recorded no spectra; this figure shows them. Train with --record.spectra true."
        )
    match name:
        case "stability":
            return stability(record, width=width)
        case "r":
            return inner_dimension(record, width=width, last_step=run.last_step)
        case _:
            return waterfall(record[layer or record.layers[0]], width=width)
