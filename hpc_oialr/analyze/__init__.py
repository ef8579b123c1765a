"""Spectra of checkpoints that another program wrote."""

from hpc_oialr.analyze.analysis import analyze
from hpc_oialr.analyze.matrices import MatrixSelection

__all__ = ["MatrixSelection", "analyze"]
