"""A list of runs: which are left to do, which the time still allows, and the file their rows are kept in."""

from __future__ import annotations

import fcntl
import functools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cifar.images import Images
from benchmarks.cifar.training import train
from benchmarks.cifar.variants import Variant
from hpc_oialr.errors import NonFiniteError
from hpc_oialr.record.environment_report import environment_report

Row = dict[str, Any]
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
    _load_libraries(data.train_labels.device)
    known = {_key(row) for row in finished}
    pace = 0.0  # seconds a step
    for seed in seeds:
        for variant in (_complete(variant, data) for variant in variants):
            head = _head(variant, data, seed)
            if _key(head) in known:
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


@functools.cache
def _load_libraries(device: torch.device) -> None:
    """Products, a QR, an SVD, eigenvectors: a GPU loads its libraries once, which is no run's training time."""
    matrix = torch.eye(256, device=device) + 0.01
    for decompose in (torch.linalg.qr, torch.linalg.svd, torch.linalg.eigh):
        decompose(matrix @ matrix)
    matrix.bfloat16() @ matrix.bfloat16()


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


def _key(row: Row) -> str:
    return json.dumps({name: row[name] for name in KEY}, sort_keys=True)


class RowFile:
    """Result file that several calls may add to at once; whole at every moment."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[Row]:
        """Finished runs; those left out or failed are tried again."""
        return [row for row in self._read() if "left_out" not in row and "failed" not in row]

    def add(self, row: Row) -> None:
        """Keep one more row, in place of an earlier one of the same run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = [other for other in self._read() if _key(other) != _key(row)]
            draft = self.path.with_suffix(".tmp")
            content = {"rows": [*rows, row], "environment": environment_report()}
            draft.write_text(json.dumps(content, indent=1) + "\n")
            draft.replace(self.path)

    def _read(self) -> list[Row]:
        if not self.path.exists():
            return []
        rows: list[Row] = json.loads(self.path.read_text())["rows"]
        return rows
