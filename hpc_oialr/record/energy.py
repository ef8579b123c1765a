"""Energy that this process's devices have used: GPUs by NVML, processors by RAPL."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")

# Joules counted so far; raises OSError, ValueError or RuntimeError.
Counter = Callable[[], float]


class EnergyMeter:
    """Adds up hardware counters, which cost microseconds to read and miss nothing between two readings.

    A GPU's counter is read by the rank that computes on it, a node's processors by the node's first rank:
    the sum over all ranks counts each once. If the device that computes cannot be read all is NaN; beside a
    GPU the processors are left out where they cannot be, since RAPL's files are often readable by root only.

    Needs the extra ``energy`` for GPUs (nvidia-ml-py). perun measures by the same counters, around whole programs.

    ``first_of_node``: whether this rank answers for the node's processors; ``powercap``: the folder of RAPL's files.
    """

    def __init__(self, device: torch.device, *, first_of_node: bool, powercap: Path = POWERCAP) -> None:
        self._counters = _processor_counters(powercap) if first_of_node else []
        self._complete = bool(self._counters) or not first_of_node
        if device.type == "cuda":
            gpu = _gpu_counter(device)
            self._complete = gpu is not None
            self._counters += [gpu] if gpu is not None else []
        self._last = self._read()

    def since_last(self) -> float:
        """Joules since the last call, or since the meter was made; NaN if they cannot be told."""
        now = self._read()
        used, self._last = now - self._last, now
        return used

    def _read(self) -> float:
        if not self._complete:
            return math.nan
        try:
            return sum(counter() for counter in self._counters)
        except (OSError, ValueError, RuntimeError):
            self._complete = False
            return math.nan


class _Package:
    """RAPL's counter of one processor package, which starts again from 0 after its highest value."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._highest = int((folder / "max_energy_range_uj").read_text())
        self._last = self._rounds = 0
        self()

    def __call__(self) -> float:
        value = int(self._file.read_text())
        if value < self._last:
            self._rounds += self._highest
        self._last = value
        return (self._rounds + value) / 1e6


def _processor_counters(powercap: Path) -> list[Counter]:
    """One for each package; its parts (cores, graphics) are in it. None at all if one may not be read."""
    packages = sorted(powercap.glob("intel-rapl:?")) + sorted(powercap.glob("intel-rapl:??"))
    try:
        return [_Package(package) for package in packages]
    except (OSError, ValueError):
        return []


def _gpu_counter(device: torch.device) -> Counter | None:
    try:
        import pynvml
    except ImportError:
        log.info("energy of GPUs is not read: pip install 'hpc_oialr[energy]'")
        return None
    nvml: Any = pynvml
    try:
        nvml.nvmlInit()
        # Not the index, which CUDA_VISIBLE_DEVICES shifts.
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (nvml.NVMLError, AttributeError, RuntimeError) as error:
        log.info("energy of %s is not read (%s)", device, error)
        return None

    def read() -> float:
        try:
            return float(nvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000
        except nvml.NVMLError as error:
            raise RuntimeError(str(error)) from error

    return read
