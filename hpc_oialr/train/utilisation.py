"""Model FLOPs utilisation (MFU): the operations of a step, over what the GPU could do in the time it took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.utils.flop_counter import FlopCounterMode

from hpc_oialr.train.config import RunConfig

# Part of a device's name, and dense TFLOP/s of its data sheet (no sparsity): products in bf16 or fp16, and in TF32.
PEAKS: tuple[tuple[str, float, float], ...] = (
    ("H100 PCIe", 756.0, 378.0),
    ("H100 NVL", 835.5, 417.5),
    ("H200 NVL", 835.5, 417.5),
    ("H100", 989.0, 494.5),  # SXM5
    ("H200", 989.0, 494.5),
    ("GH200", 989.0, 494.5),
    ("A100", 312.0, 156.0),
)


def known_peak(name: str, precision: str, *, tf32: bool) -> float | None:
    """FLOP/s of the GPU called ``name`` in products of a run's ``precision``; None where no data sheet is known."""
    half = precision in ("bf16", "bf16-params", "fp16")
    if not (half or (precision == "fp32" and tf32)):
        return None
    found = next((row for row in PEAKS if row[0] in name), None)
    return None if found is None else 1e12 * (found[1] if half else found[2])


class Utilisation:
    """Counts the operations of one step for each set of r, where the device's peak is known.

    Counted are products, convolutions and attentions of forward and backward pass as they are run: low-rank layers with
    their own count, recomputed activations twice, optimizer and updates not.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        train = config.train
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        stated = train.peak_tflops
        self.peak = known_peak(name, train.precision, tf32=train.tf32) if stated is None else 1e12 * stated
        self._compiles = self._first = config.compile != "off"
        self._flops, self._due = 0, self.peak is not None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around a step; one at the beginning and the first after :meth:`forget` are counted, and run uncompiled."""
        # A run's first step compiles: from its end recompilations are counted.
        compiling, self._first = self._first, False
        if compiling or not self._due:
            yield
            return
        eager = torch.compiler.set_stance("force_eager") if self._compiles else nullcontext()
        with eager, FlopCounterMode(display=False) as counter:
            yield
        self._flops, self._due = counter.get_total_flops(), False

    def forget(self) -> None:
        """Count the next step: r has changed."""
        self._due = self.peak is not None

    def mfu(self, steps_per_s: float) -> float | None:
        """In [0, 1]; None before the first counted step, and where the peak is unknown."""
        return None if self.peak is None or not self._flops else self._flops * steps_per_s / self.peak
