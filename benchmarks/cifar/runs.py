"""A list of runs: which are left to do, which the time still allows, and the file their rows are kept in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import row_file
from benchmarks.cifar.images import Images
from benchmarks.cifar.training import train
from benchmarks.cifar.variants import Variant
from benchmarks.clock import load_libraries
from benchmarks.row_file import Row, key_of
from hpc_oialr.errors import NonFiniteError

KEY = ("run", "seed", "size", "judged_on", "epochs", "batch", "settings")


def run(
    variants: Sequence[Variant],
    data: Images,
    device: torch.device | str,
    out: Callable[[Row], object],
    deadline: float | None = None,
    *,
    seeds: Sequence[int] = (0,),
    evaluations: int = 10,
    finished: Iterable[Row] = (),
) -> None:
    """Train every variant with every seed, one after another, all variants before the next seed.

    Parameters
    ----------
    variants
        What is not set in them (epochs, batch) is the size's.
    data
        From :func:`benchmarks.cifar.load`.
    out
        Gets each run's row as it is finished. A run that is not started for want of time gives a row whose
        ``left_out`` says so, one that diverges a row with ``failed``.
    deadline
        Of ``time.monotonic()``; a run that would pass it, going by the slowest finished run's time for a step, is
        not started. None = no limit.
    finished
        Rows of earlier calls, which are not run again.
    """
    data = data.to(torch.device(device))
    load_libraries(data.train_labels.device)
    known = {key_of(row, KEY) for row in finished}
    pace = 0.0  # seconds a step
    for seed in seeds:
        for variant in (_complete(variant, data) for variant in variants):
            head = _head(variant, data, seed)
            if key_of(head, KEY) in known:
                continue
            steps = _steps(variant, data)
            left = float("inf") if deadline is None else deadline - time.monotonic()
            if left <= pace * steps:
                why = f"needs about {pace * steps:.0f} s, {max(0.0, left):.0f} s are left"
                out({**head, "left_out": why})
                continue
            start = time.monotonic()
            try:
                row = train(variant, data, seed, evaluations=evaluations)
            except NonFiniteError as error:
                row = {**head, "failed": str(error)}
            pace = max(pace, (time.monotonic() - start) / steps)
            out(row)


def _complete(variant: Variant, data: Images) -> Variant:
    return replace(variant, epochs=float(variant.epochs or data.size.epochs), batch=variant.batch or data.size.batch)


def _steps(variant: Variant, data: Images) -> int:
    assert variant.batch is not None
    assert variant.epochs is not None
    return max(1, round(variant.epochs * max(1, len(data.train_labels) // variant.batch)))


def _head(variant: Variant, data: Images, seed: int) -> Row:
    """What a row begins with, and is known by."""
    return {
        "run": variant.name,
        "seed": seed,
        "size": data.size.name,
        "judged_on": data.judge,
        "epochs": variant.epochs,
        "batch": variant.batch,
        "settings": variant.settings(),
    }


class RowFile(row_file.RowFile):
    """Result file of these runs, that several calls may add to at once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, KEY)
