"""All ways of writing spectra, by real processes, against each other: equal records?

To be started by MPI, with an h5py that was built with it (``hpc_oialr.spectra.parallel.BUILD`` says how)::

    mpirun -n 8 python -m benchmarks.spectra_modes --out benchmarks/results/spectra_modes.json

Each way writes a run that is stopped, resumed at an older step, and ended; records are compared data set by data
set, as hpc_oialr reads them and as plain HDF5. Needs neither torch nor a training.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from benchmarks.result_file import RESULT, result_file
from hpc_oialr.method.report import LayerUpdate, UpdateReport
from hpc_oialr.outputs import claim, new_file
from hpc_oialr.spectra import open as open_spectra
from hpc_oialr.spectra.modes import MODES, Mode, finish_record, make_writer

LAYERS = tuple(f"encoder.{i}/dense" for i in range(48))
STOPPED_AT, RESUMED_AT, LAST, K = 35, 20, 50, 256


@dataclass(frozen=True)
class Processes:
    """What of a World the modes ask for."""

    comm: Any
    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        """Whether this is the first one."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all."""
        self.comm.Barrier()


def report(t: int) -> UpdateReport:
    """An event of step ``t``; all layers at first, then more and more of the last ones."""
    generator = np.random.default_rng(t)
    names = LAYERS if t == 1 else LAYERS[-min(len(LAYERS), 5 * t) :]
    layers = tuple(
        LayerUpdate(
            name=name,
            m=2 * K,
            n=K,
            r_before=K,
            r=K - t,
            singular_values=np.sort(generator.random(K, dtype=np.float32))[::-1],  # type: ignore[arg-type]
            stability=float(generator.random()),
            orthogonality_error_U=1e-7,
            orthogonality_error_Vh=1e-7,
            seconds=0.01,
        )
        for name in names
    )
    return UpdateReport(
        t=t, kind="conversion" if t == 1 else "update", layers=layers, seconds=1.0, bytes_sent=0
    )


def write(mode: Mode, head: Path, world: Processes, steps: range, after: int) -> Any:
    """Go on after a step; the writer, with everything on the disk."""
    writer = make_writer(mode, head, world, layers=LAYERS, attributes={"seed": 1}, comm=world.comm.Dup())  # type: ignore[arg-type]
    if writer is None:
        return None
    writer.truncate_after(after)
    for t in steps:
        writer.write(report(t))
        if world.is_main:
            writer.add_steps({"step": t, "loss": 1 / t, "trained_parameters": 1, "memory_bytes": 1})
    writer.flush()
    return writer


def run(mode: Mode, head: Path, world: Processes) -> None:
    """A run that is stopped and resumed."""
    world.barrier()
    writer = write(mode, head, world, range(1, STOPPED_AT + 1), after=0)
    if writer is not None:
        writer.close()
    world.barrier()
    writer = write(mode, head, world, range(RESUMED_AT + 1, LAST + 1), after=RESUMED_AT)
    finish_record(mode, writer, head, world)  # type: ignore[arg-type]
    if writer is not None:
        writer.close()
    world.barrier()


def content(head: Path) -> dict[str, bytes]:
    """Every data set, as plain HDF5 and through the reader."""
    found: dict[str, bytes] = {}
    with h5py.File(head, "r") as file:
        file.visititems(
            lambda name, item: (
                found.update({name: item[()].tobytes()}) if isinstance(item, h5py.Dataset) else None
            )
        )
    with open_spectra(head) as opened:
        found["reader: events"], found["reader: steps"] = opened.events.tobytes(), opened.steps.tobytes()
        for name, layer in opened.items():
            found[f"reader: {name}"] = layer.singular_values.tobytes()
    return found


def main() -> None:
    """All modes that this h5py can do."""
    from mpi4py import MPI

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=result_file, help="result file (JSON); default: print only")
    out = parser.parse_args().out
    comm = MPI.COMM_WORLD
    world = Processes(comm, comm.rank, comm.size)
    scratch = Path(comm.bcast(tempfile.mkdtemp() if world.is_main else None))
    rows, expected = [], None
    for mode in MODES if h5py.get_config().mpi else MODES[:2]:
        head = scratch / mode / "spectra.h5"
        if world.is_main:
            head.parent.mkdir()
        run(mode, head, world)
        if world.is_main:
            found = content(head)
            expected = expected or found
            files = len(list(head.parent.iterdir()))
            row = {"mode": mode, "processes": world.size, "data_sets": len(found), "files": files}
            rows.append(row | {"equal": found == expected})
            print(rows[-1], flush=True)
    if out is not None and world.is_main:
        environment = {
            "h5py": h5py.__version__, "hdf5": h5py.version.hdf5_version,
            "mpi": MPI.Get_library_version().partition(",")[0],
            "python": platform.python_version(), "machine": platform.processor() or platform.machine(),
        }  # fmt: skip
        with new_file(claim(out, RESULT, force=None)) as draft:
            draft.write_text(json.dumps({"rows": rows, "environment": environment}, indent=1) + "\n")


if __name__ == "__main__":
    main()
