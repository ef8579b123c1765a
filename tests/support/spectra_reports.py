"""Events as a training would report them, and records compared data set by data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpc_oialr.method.report import Kind, LayerUpdate, UpdateReport
from hpc_oialr.spectra import Spectra, open
from hpc_oialr.spectra.store import Chain
from hpc_oialr.spectra.writer import SpectraWriter

NAMES = ("encoder.0", "head/out", ".", "", "größe %")
ATTRIBUTES = {"config": {"beta": 0.1}, "seed": 3, "world_size": 2}


# Every flush becomes an HDF5 segment of its own.
SEGMENTS = {"join_flushes": 1, "join_bytes": 1}


def report(t: int, kind: Kind = "update", names: tuple[str, ...] = NAMES, k: int = 5) -> UpdateReport:
    """An event of step ``t``, always the same one."""
    generator = np.random.default_rng(t)
    layers = tuple(
        LayerUpdate(
            name=name,
            m=k + 1 + (NAMES.index(name) if name in NAMES else len(name)),
            n=k,
            r_before=k - 1,
            r=k - 2,
            singular_values=_descending(generator, k - 1),
            stability=None if kind == "conversion" else 0.5,
            orthogonality_error_U=1e-7 * t,
            orthogonality_error_Vh=2e-7,
            seconds=0.25,
        )
        for name in names
    )
    return UpdateReport(t=t, kind=kind, layers=layers, seconds=1.0, bytes_sent=10)


def _descending(generator: np.random.Generator, count: int) -> np.ndarray:
    return np.sort(generator.random(count, dtype=np.float32))[::-1].copy()


def step_row(step: int) -> dict[str, float]:
    """A row of the table of steps."""
    numbers = {
        "loss": 1 / step,
        "lr": 0.1,
        "trained_parameters": 100,
        "memory_bytes": 2**20,
        "wall_s": 0.5 * step,
    }
    return {"step": step, **numbers}


def writer_of(
    path: Path,
    *,
    join: dict[str, int] | None = None,
    memory_bytes: int = 2**20,
    **options: object,
) -> SpectraWriter:
    """A run's writer."""
    chain = Chain(path, ATTRIBUTES, **join or {})
    return SpectraWriter(chain, NAMES, memory_bytes=memory_bytes, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Content:
    """Everything that a record says."""

    layers: tuple[str, ...]
    shapes: list[tuple[int, int]]
    events: bytes
    steps: bytes
    singular_values: list[bytes]


def content(path: Path | Spectra) -> Content:
    """A record's content, to be compared with ``==``."""
    if isinstance(path, Path):
        with open(path) as run:
            return content(run)
    return Content(
        layers=path.layers,
        shapes=[(layer.m, layer.n) for layer in path.values()],
        events=path.events.tobytes(),
        steps=path.steps.tobytes(),
        singular_values=[layer.singular_values.tobytes() for layer in path.values()],
    )


def steps_in(path: Path, layer: str = "encoder.0") -> list[int]:
    """Steps of a layer's events."""
    with open(path) as run:
        return run[layer].t.tolist() if layer in run else []
