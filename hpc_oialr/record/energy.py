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

Counter = Callable[[], float]


class EnergyMeter:
    """Adds up hardware counters, which cost microseconds to read and miss nothing between two looks.

    A GPU's counter is read by the process that computes on it, a node's processors by the node's first process:
    the sum over all processes counts each once. If the device that computes cannot be read all is NaN; beside a
    GPU the processors are left out where they cannot be, since RAPL's files are often readable by root only.

    Parameters
    ----------
    device
        Where this process computes.
    first_of_node
        Whether this process answers for the node's processors.
    powercap
        The folder of RAPL's files.

    Notes
    -----
    Needs the extra ``energy`` for GPUs (nvidia-ml-py). perun measures by the same counters, around whole programs.
    """

    def __init__(self, device: torch.device, *, first_of_node: bool, powercap: Path = POWERCAP) -> None:
        gpus = [_gpu_counter(device)] if device.type == "cuda" else []
        processors = _processor_counters(powercap) if first_of_node else []
        readable = bool(processors) or not first_of_node
        self._complete = all(gpus) if gpus else readable
        self._counters = [counter for counter in (*gpus, *processors) if counter is not None]
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


class Wrapping:
    """A counter that starts again from 0 after its highest value.

    Examples
    --------
    >>> values = iter([8.0, 2.0, 3.0])
    >>> counter = Wrapping(lambda: next(values), highest=10.0)
    >>> counter(), counter(), counter()
    (8.0, 12.0, 13.0)
    """

    def __init__(self, read: Counter, highest: float) -> None:
        self._read, self._highest = read, highest
        self._last = self._rounds = 0.0

    def __call__(self) -> float:
        """What has been counted since the first call, and the value at that one."""
        value = self._read()
        if value < self._last:
            self._rounds += self._highest
        self._last = value
        return self._rounds + value


def _processor_counters(powercap: Path) -> list[Counter]:
    """One for each package; its parts (cores, graphics) are in it. None at all if one may not be read."""
    packages = sorted(powercap.glob("intel-rapl:?")) + sorted(powercap.glob("intel-rapl:??"))
    counters = [_package_counter(package) for package in packages]
    return [] if None in counters else [counter for counter in counters if counter is not None]


def _package_counter(package: Path) -> Counter | None:
    def read() -> float:
        return int((package / "energy_uj").read_text()) / 1e6

    try:
        read()
        highest = int((package / "max_energy_range_uj").read_text()) / 1e6
    except (OSError, ValueError):
        return None
    return Wrapping(read, highest)


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
