"""How much memory a call takes at its peak, as the kernel sees it (Linux)."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(function: Callable[[], object]) -> int:
    """Highest resident size during the call over the size before it."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    RESET.write_text("5")
    before = _status_bytes("VmRSS")
    function()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
