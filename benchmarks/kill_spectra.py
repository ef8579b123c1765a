"""Kill -9 while spectra are written, at random moments of a record's whole life, and see what is left.

A process writes events, joins flushes on the way, goes on from an older step as a resumed run does, and joins all at the
end; it tells which events its writer has confirmed. It is killed at a random moment. Then: the record opens, no
confirmed event is missing, nothing is doubled; and a run that goes on from there ends with a record that is equal,
data set by data set, to that of an undisturbed run.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpc_oialr.method.report import LayerUpdate, UpdateReport
from hpc_oialr.spectra import open as open_spectra
from hpc_oialr.spectra.store import Chain
from hpc_oialr.spectra.writer import SpectraWriter

LAYERS = tuple(f"encoder.{i}/dense" for i in range(4))
RESUMED_AT, LAST, CHECKPOINT = 40, 90, 10
JOIN_FLUSHES, JOIN_BYTES = 6, 30_000

Confirm = Callable[[int], None]


def report(t: int, k: int = 96) -> UpdateReport:
    """An event of step ``t``, always the same one."""
    generator = np.random.default_rng(t)
    layers = tuple(
        LayerUpdate(
            name=name,
            m=2 * k,
            n=k,
            r_before=k,
            r=k - 1,
            singular_values=np.sort(generator.random(k, dtype=np.float32))[::-1],  # type: ignore[arg-type]
            stability=float(generator.random()),
            orthogonality_error_U=1e-7,
            orthogonality_error_Vh=1e-7,
            seconds=0.01,
        )
        for name in LAYERS
    )
    return UpdateReport(t=t, kind="update", layers=layers, seconds=1.0, bytes_sent=0)


def writer_of(path: Path) -> SpectraWriter:
    """As a run has one, with flushes that are joined often."""
    return SpectraWriter(Chain(path, {"seed": 1}, join_flushes=JOIN_FLUSHES, join_bytes=JOIN_BYTES), LAYERS)


def write(path: Path, after: int, last: int, confirm: Confirm) -> SpectraWriter:
    """Go on after step ``after`` up to ``last``, with a flush now and then."""
    writer = writer_of(path)
    writer.truncate_after(after)
    for t in range(after + 1, last + 1):
        writer.write(report(t))
        writer.add_steps({"step": t, "loss": 1 / t, "trained_parameters": 1, "memory_bytes": 1})
        if t % CHECKPOINT == 0:
            writer.flush()
        confirm(after + writer.written)
    writer.flush()
    confirm(after + writer.written)
    return writer


def life(path: Path, confirm: Confirm) -> None:
    """A run that is resumed once, from its beginning to its end."""
    write(path, 0, RESUMED_AT + 7, confirm).close()
    confirm(RESUMED_AT)
    writer = write(path, RESUMED_AT, LAST, confirm)
    writer.finish()
    writer.close()


def forked(work: Callable[[Confirm], None], after_s: float | None) -> tuple[int, float]:
    """Do it in a child that is killed ``after_s`` seconds after its first word; its last word, and its time."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        work(lambda t: os.write(sink, t.to_bytes(4, "big")) and None)
        os._exit(0)
    os.close(sink)
    said, start = os.read(source, 4), time.monotonic()
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    while part := os.read(source, 65536):
        said += part
    os.waitpid(child, 0)
    os.close(source)
    whole = said[: len(said) // 4 * 4]
    return int.from_bytes(whole[-4:], "big"), time.monotonic() - start


def content(path: Path) -> list[Any]:
    """Every data set of every layer, as bytes, and the table of steps."""
    with open_spectra(path) as run:
        steps = {name: run.steps[name].tolist() for name in ("step", "loss")}
        return [(n, layer.events.tobytes(), layer.singular_values.tobytes()) for n, layer in run.items()] + [steps]


def found(path: Path) -> list[int]:
    """Steps of the record's events, the same ones for all layers; nothing before the first one was written."""
    if not list(path.parent.glob(f"{path.name}*")):
        return []
    with open_spectra(path) as run:
        steps = [layer.t.tolist() for layer in run.values()]
        assert all(t == steps[0] for t in steps), "an event is there for all layers or for none"
        for layer in run.values():
            assert len(layer.singular_values) == len(layer)
    return steps[0] if steps else []


def one(path: Path, after_s: float, expected: list[Any]) -> dict[str, Any]:
    """Kill, look, go on, compare."""
    path.parent.mkdir()
    confirmed, _ = forked(lambda confirm: life(path, confirm), after_s)
    steps = found(path)
    files = sorted(file.name for file in path.parent.iterdir())
    row = {
        "confirmed": confirmed,
        "events": len(steps),
        "flushes": sum(name.endswith(".npz") for name in files),
        "segments": sum(name[-4:-3] == "." and name[-3:].isdigit() for name in files),
        "in_a_write": any(name.endswith(".tmp") for name in files),
        "nothing_lost": len(steps) >= confirmed and steps == list(range(1, len(steps) + 1)),
    }
    kept = min(confirmed, len(steps)) // CHECKPOINT * CHECKPOINT
    writer = write(path, kept, LAST, lambda _: None)
    writer.finish()
    writer.close()
    return row | {"equal": content(path) == expected, "one_file": [path] == list(path.parent.iterdir())}


def moments(folder: Path, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row for each kill."""
    undisturbed = folder / "undisturbed.h5"
    _, seconds = forked(lambda confirm: life(undisturbed, confirm), None)
    expected, chance = content(undisturbed), random.Random(seed)
    for moment in range(count):
        yield one(folder / f"run{moment}" / "spectra.h5", chance.uniform(0, seconds), expected)


def main() -> None:
    """All moments."""
    from benchmarks.common import arguments, finish

    parser = arguments(__doc__ or "")
    parser.add_argument("--moments", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        rows = list(moments(Path(scratch), options.moments, options.seed))
    finish(rows, options.out)
    if not all(row["nothing_lost"] and row["equal"] and row["one_file"] for row in rows):
        sys.exit("a record lost an event, or differs from the undisturbed one")


if __name__ == "__main__":
    main()
