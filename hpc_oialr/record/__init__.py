"""The record of a run: its folder, metrics, memory, energy, progress and surroundings."""

from typing import TYPE_CHECKING

from hpc_oialr.lazy import offer

if TYPE_CHECKING:
    from hpc_oialr.record.environment_report import environment_report
    from hpc_oialr.record.memory import MemoryMeter, peak_rss_bytes, resident_bytes
    from hpc_oialr.record.metrics import MetricsWriter, read_metrics
    from hpc_oialr.record.progress import Progress, Status, Throughput, make_progress
    from hpc_oialr.record.run_folder import RunFolder

__all__ = [
    "MemoryMeter",
    "MetricsWriter",
    "Progress",
    "RunFolder",
    "Status",
    "Throughput",
    "environment_report",
    "make_progress",
    "peak_rss_bytes",
    "read_metrics",
    "resident_bytes",
]

offer(__name__)
