"""What all benchmarks share: paired timing, arguments, and result files that say where they come from."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.result_file import RESULT, result_file
from hpc_oialr.outputs import claim, new_file
from hpc_oialr.record.environment_report import environment_report

Row = dict[str, Any]
# Calls in a row that one measurement on a GPU takes together.
CALLS = 10


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with ``--out``, which may name an earlier result but no other file; scripts add their own options."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=result_file, help="result file (JSON); default: print only")
    return parser


def finish(rows: Sequence[Row], out: Path | None, **extra: Any) -> None:
    """Print the rows as a table and write ``{"rows": ..., "environment": ...}`` to ``out``."""
    print_table(rows)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {"rows": list(rows), **extra, "environment": environment_report()}
        with new_file(claim(out, RESULT, force=None)) as draft:
            draft.write_text(json.dumps(content, indent=1) + "\n")
        print(out)


def earlier(out: Path | None) -> list[Row]:
    """Rows of an interrupted call, which need not be measured again."""
    if out is None or not out.exists():
        return []
    rows: list[Row] = json.loads(out.read_text())["rows"]
    return rows


def print_table(rows: Sequence[Row]) -> None:
    """Aligned columns; floats with three significant digits."""
    if not rows:
        return
    keys = list(rows[0])
    cells = [[_text(row.get(key)) for key in keys] for row in rows]
    widths = [max(len(key), *(len(line[i]) for line in cells)) for i, key in enumerate(keys)]
    for line in [keys, *cells]:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call; on a GPU of its kernels, not of their launches, where these are not what it waits for."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # While the GPU is busy with this call the next ones are launched, and theirs are not seen.
    function()
    begin.record()
    for _ in range(CALLS):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / CALLS


def time_ratios(
    functions: Mapping[str, Callable[[], object]], reference: str, *, repeats: int, warmup: int = 2
) -> tuple[dict[str, float], float]:
    """Time of each function over the reference's, in one run.

    All are called in turn, again and again, so that drifts of the machine's speed meet all of them.

    Returns
    -------
    Median over the repeats of each ratio, and the reference's median time (s).
    """
    for _ in range(warmup):
        for function in functions.values():
            function()
    rounds = [{name: timed(function) for name, function in functions.items()} for _ in range(repeats)]
    ratios = {name: statistics.median(r[name] / r[reference] for r in rounds) for name in functions}
    return ratios, statistics.median(r[reference] for r in rounds)
