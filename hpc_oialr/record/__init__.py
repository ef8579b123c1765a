"""The record of a run: its folder, metrics, spectra, memory, progress and surroundings."""

from hpc_oialr.record.environment_report import environment_report
from hpc_oialr.record.memory import MemoryMeter, peak_rss_bytes, resident_bytes
from hpc_oialr.record.metrics import MetricsWriter, read_metrics
from hpc_oialr.record.pace import Pace
from hpc_oialr.record.progress import Progress, Status, make_progress
from hpc_oialr.record.run_folder import RunFolder
from hpc_oialr.record.spectra import SpectraWriter, read_spectra

__all__ = [
    "MemoryMeter",
    "MetricsWriter",
    "Pace",
    "Progress",
    "RunFolder",
    "SpectraWriter",
    "Status",
    "environment_report",
    "make_progress",
    "peak_rss_bytes",
    "read_metrics",
    "read_spectra",
    "resident_bytes",
]
