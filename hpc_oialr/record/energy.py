"""Energy used by this rank's devices: GPUs by NVML, processors by RAPL."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")

Counter = Callable[[], float]  # joules counted so far; raises OSError, ValueError or RuntimeError


class EnergyMeter:
    """Adds up hardware counters, which cost microseconds to read and miss nothing between two readings.

    A GPU is read by the rank that computes on it, a node's processors by the rank that is ``first_of_node``: the sum
    over all ranks counts each once. NaN if the device that computes cannot be read; beside a GPU unreadable processors
    are left out, since RAPL's files (in ``powercap``) are often readable by root only. GPUs need the extra ``energy``.
    """

    def __init__(self, device: torch.device, *, first_of_node: bool, powercap: Path = POWERCAP) -> None:
        self._counters: list[Counter] = []
        if first_of_node:
            # A package's counter includes its parts (cores, graphics). None at all if one cannot be read.
            packages = [*sorted(powercap.glob("intel-rapl:?")), *sorted(powercap.glob("intel-rapl:??"))]
            with contextlib.suppress(OSError, ValueError):
                self._counters = [_package_counter(package) for package in packages]
        self._complete = bool(self._counters) or not first_of_node
        if device.type == "cuda":
            gpu = _gpu_counter(device)
            self._complete = gpu is not None
            self._counters += [gpu] if gpu is not None else []
        self._last = self._read()

    def since_last(self) -> float:
        """Joules since the last call, or since the meter was made; NaN if unknown."""
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


def _package_counter(folder: Path) -> Counter:
    """RAPL's counter of one processor package, which starts again from 0 after its highest value."""
    highest, last, rounds = int((folder / "max_energy_range_uj").read_text()), 0, 0

    def read() -> float:
        nonlocal last, rounds
        value = int((folder / "energy_uj").read_text())
        rounds += highest if value < last else 0
        last = value
        return (rounds + value) / 1e6

    read()
    return read


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
