"""One record written by all processes together, through parallel HDF5."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_oialr.errors import ConfigError
from hpc_oialr.spectra.layout import describe, make_group, make_steps
from hpc_oialr.spectra.names import segment_path, segments_of
from hpc_oialr.spectra.rows import LayerRows, Rows
from hpc_oialr.spectra.schema import EVENT
from hpc_oialr.spectra.segments import SegmentedFile

BUILD = (
    "Build h5py with MPI, in an environment that has numpy, mpi4py, cython, pkgconfig, wheel and setuptools: "
    "apt-get install libhdf5-openmpi-dev (or load your cluster's parallel HDF5); "
    "CC=mpicc HDF5_MPI=ON HDF5_DIR=/usr/lib/x86_64-linux-gnu/hdf5/openmpi "
    "pip install --no-build-isolation --no-deps --no-binary=h5py h5py. "
    "Or take record.spectra_writer per_process."
)

Shape = tuple[str, int, int, int, int]


def check_parallel(comm: Any) -> None:
    """Raise :class:`ConfigError` unless processes that MPI started have an h5py that was built with MPI."""
    if not h5py.get_config().mpi:
        rule = f"h5py {h5py.__version__} here was built without MPI"
        raise ConfigError("record.spectra_writer", "parallel", rule, fix=BUILD)
    if comm is None:
        raise ConfigError(
            "record.spectra_writer",
            "parallel",
            "needs processes that MPI started",
            fix="Start with mpirun or srun --mpi=pmix, or take per_process.",
        )


class ParallelStore:
    """Each call of :meth:`append` makes one closed segment, written by all processes, then renamed.

    So a process that dies while all write leaves a draft, and the segments before it whole. All methods are
    collective calls, and fail on all processes if they fail on one.

    Parameters
    ----------
    path
        The record's head, which only :meth:`join` makes.
    attributes
        Of the root; the first process's are taken.
    comm
        An mpi4py communicator of all processes, on which nobody else sends.
    """

    collective = True

    def __init__(self, path: Path | str, attributes: Mapping[str, Any], comm: Any) -> None:
        self.path, self.comm = Path(path), comm
        self._attributes: Mapping[str, Any] = comm.bcast(dict(attributes))
        self._whole = SegmentedFile(self.path, self._attributes)
        self._before: int | None = None

    def append(self, rows: Rows) -> None:
        """Write the rows of all processes.

        Raises
        ------
        OSError
            On all processes, if any of them could not write.
        """
        shapes: list[tuple[list[Shape], int]] = self.comm.allgather((_shapes(rows), len(rows.steps)))
        if not any(layers or steps for layers, steps in shapes):
            return
        if self._before is None:
            self._alone(self._whole.close_head)
            self._before = self.comm.bcast(max(segments_of(self.path), default=0))
        segment = segment_path(self.path, self._before + 1)
        draft = segment.with_name(f".{segment.name}.tmp")
        self._together(lambda: self._write(draft, rows, shapes))
        self._alone(lambda: _publish(draft, segment))
        self._before += 1

    def cut_after(self, t: int) -> None:
        """Drop rows of later steps."""
        self._alone(lambda: self._whole.cut_after(t))
        self._before = None

    def join(self) -> None:
        """Make one plain file, on the first process."""
        self._alone(self._whole.join)
        self._before = None

    def close(self) -> None:
        """Nothing is open between two calls."""

    def _write(self, draft: Path, rows: Rows, shapes: Sequence[tuple[list[Shape], int]]) -> None:
        mine = {layer.name: layer for layer in rows.layers}
        with h5py.File(draft, "w", driver="mpio", comm=self.comm, libver="v110") as file:
            describe(file, self._attributes)
            for name, index, m, n, count in (shape for layers, _ in shapes for shape in layers):
                empty = LayerRows(name, index, m, n, np.zeros(0, EVENT), np.zeros((0, min(m, n)), np.float32))
                group, own = make_group(file, empty, count), mine.get(name)
                _fill(group["events"], count, None if own is None else own.events)
                _fill(group["singular_values"], count, None if own is None else own.singular_values)
            for rank, (_, count) in enumerate(shapes):
                if count:
                    _fill(make_steps(file, count), count, rows.steps if rank == self.comm.rank else None)

    def _alone(self, action: Callable[[], None]) -> None:
        """On the first process."""
        self._together(action if self.comm.rank == 0 else lambda: None)

    def _together(self, action: Callable[[], None]) -> None:
        """Do it, and fail together."""
        failure = ""
        try:
            action()
        except (OSError, RuntimeError, KeyError, ValueError) as error:
            failure = f"process {self.comm.rank}: {error}"
        failures = [text for text in self.comm.allgather(failure) if text]
        if failures:
            raise OSError(failures[0])


def _shapes(rows: Rows) -> list[Shape]:
    return [(layer.name, layer.index, layer.m, layer.n, len(layer.events)) for layer in rows.layers]


def _fill(dataset: h5py.Dataset, count: int, rows: NDArray[Any] | None) -> None:
    """Write a whole data set from the process that has its rows; filters want all processes to take part."""
    target = dataset.id
    shape = (count, *target.shape[1:])
    target.set_extent(shape)
    space, memory = target.get_space(), h5py.h5s.create_simple(shape)
    if rows is None:
        space.select_none()
        memory.select_none()
        rows = np.zeros(shape, dtype=dataset.dtype)
    transfer = h5py.h5p.create(h5py.h5p.DATASET_XFER)
    transfer.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE)
    kind = h5py.h5t.py_create(dataset.dtype, logical=True)
    target.write(memory, space, np.ascontiguousarray(rows), mtype=kind, dxpl=transfer)


def _publish(draft: Path, segment: Path) -> None:
    with draft.open("rb") as written:
        os.fsync(written.fileno())
    draft.replace(segment)
