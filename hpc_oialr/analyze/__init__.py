"""The figures of a run's spectra for checkpoints of a training made elsewhere."""

from hpc_oialr.analyze.analysis import analyze
from hpc_oialr.analyze.matrices import MatrixSelection

__all__ = ["MatrixSelection", "analyze"]
