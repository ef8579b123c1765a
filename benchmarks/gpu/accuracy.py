"""Accuracy against training time on CIFAR-10, a few runs of ``benchmarks.cifar``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.common import Row
from benchmarks.gpu.runner import Case, Context, NotRunError

if TYPE_CHECKING:
    from benchmarks.cifar import Images, Variant


def cases(context: Context) -> Sequence[Case]:
    """One case a run, in the order of ``benchmarks.cifar.standard_variants``; in the tiny size noise will do as data."""
    if context.data is None and not context.tiny:
        return [Case("all", _without_data)]
    from benchmarks.cifar import standard_variants

    runs = Runs(context)
    variants = standard_variants()[:2] if context.tiny else standard_variants()
    return [Case(variant.name, partial(runs.measure, variant)) for variant in variants]


def _without_data() -> Sequence[Row]:
    raise NotRunError("not run: no --data")


def noise() -> Images:
    """Images of nothing in the tiny size."""
    from benchmarks.cifar import SIZES, Images

    def part(count: int) -> tuple[Tensor, Tensor]:
        return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.arange(count) % 10

    return Images(SIZES["tiny"], *part(64), *part(20), "test")


class Runs:
    """Runs of one length, so that the slowest so far tells what the next one may need."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._images: Images | None = None
        self._slowest_s = 0.0

    def measure(self, variant: Variant) -> Iterator[Row]:
        """The row of one training, as ``benchmarks.cifar`` writes it."""
        from benchmarks.cifar import load, run

        context = self._context
        if self._images is None:
            size = "tiny" if context.tiny else "full"
            self._images = noise() if context.data is None else load(context.data, size)
        if context.left_s < self._slowest_s:
            raise NotRunError(f"needs about {self._slowest_s:.0f} s, {context.left_s:.0f} s are left")
        rows: list[Row] = []
        begin = time.monotonic()
        run([variant], self._images, context.device, rows.append, context.deadline)
        self._slowest_s = max(self._slowest_s, time.monotonic() - begin)
        for row in rows:
            if "left_out" in row:
                raise NotRunError(row["left_out"])
            yield row
