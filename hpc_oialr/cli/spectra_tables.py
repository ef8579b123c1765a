"""Tables of records for the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from rich import box
from rich.table import Table

from hpc_oialr.record.metrics import read_last_metrics
from hpc_oialr.record.run_folder import RunFolder
from hpc_oialr.spectra import Layer, Spectra

_FIGURES = (
    ("stability", "stability", "{:.3f}"),
    ("stable rank", "stable_rank", "{:.1f}"),
    ("above noise", "values_above_edge", "{:.0f}"),
)


def layers_table(run: Spectra, pattern: str = "*") -> Table:
    """Each layer as it stood after its last event."""
    table = Table(title=headline(run), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", overflow="fold", min_width=20)
    for column in ("k", "r", "r / k", "events", "step", *(title for title, _, _ in _FIGURES)):
        table.add_column(column, justify="right")
    for name, layer in run.items():
        if fnmatchcase(name, pattern) and len(layer):
            table.add_row(name, *_cells(layer))
    return table


def _cells(layer: Layer) -> Iterator[str]:
    last, r = layer.events[-1], int(layer.r[-1])
    yield from (str(layer.k), str(r), f"{r / layer.k:.1%}", str(len(layer)), str(last["t"]))
    for _, field, form in _FIGURES:
        yield "" if math.isnan(last[field]) else form.format(last[field])


def headline(run: Spectra) -> str:
    """Where, how many layers and events, and the last step that is known of."""
    parts = [str(run.path), f"{len(run)} layers", f"{len(run.events)} rows"]
    step, loss = _last_step(run)
    if step is not None:
        parts.append(f"step {step}")
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    return ", ".join(parts)


def _last_step(run: Spectra) -> tuple[int | None, float | None]:
    """From ``metrics.jsonl``, which is written at once; from the record where it stands alone."""
    metrics = RunFolder(_folder(run.path)).metrics
    rows = [row for row in read_last_metrics(metrics) if "metric" not in row]
    if rows:
        return rows[-1]["step"], rows[-1]["loss"]
    if len(run.steps):
        return int(run.steps[-1]["step"]), float(run.steps[-1]["loss"])
    return None, None


def finished(path: Path) -> bool:
    """Whether the run that a record belongs to has come to its end."""
    return RunFolder(_folder(path)).finished


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
