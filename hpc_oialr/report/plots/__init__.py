"""Figures for papers, by matplotlib (extra ``plot``): one a file, each a function of a reader.

``stability(run, width="double")`` gives a :class:`matplotlib.figure.Figure`; :func:`save` writes it.
"""

from hpc_oialr.report.plots.cost import cost
from hpc_oialr.report.plots.inner_dimension import inner_dimension
from hpc_oialr.report.plots.share import share
from hpc_oialr.report.plots.stability import stability
from hpc_oialr.report.plots.style import save
from hpc_oialr.report.plots.waterfall import waterfall

__all__ = ["cost", "inner_dimension", "save", "share", "stability", "waterfall"]
