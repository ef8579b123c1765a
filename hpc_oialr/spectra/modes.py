"""Who of a run's processes writes which rows into which file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from hpc_oialr.spectra.master import write_master
from hpc_oialr.spectra.names import part_path, side_path
from hpc_oialr.spectra.parallel import ParallelStore
from hpc_oialr.spectra.parts import PartStore
from hpc_oialr.spectra.resilient import TROUBLE, ResilientStore, Store
from hpc_oialr.spectra.segments import SegmentedFile
from hpc_oialr.spectra.writer import SpectraWriter

if TYPE_CHECKING:
    from hpc_oialr.processes import World

log = logging.getLogger(__name__)

Mode = Literal["single", "per_process", "parallel"]
MODES: tuple[Mode, ...] = get_args(Mode)


def make_writer(
    mode: Mode,
    head: Path,
    world: World,
    *,
    layers: Sequence[str],
    attributes: Mapping[str, Any],
    side_folder: str | None = None,
    queue: int = 64,
    comm: Any = None,
) -> SpectraWriter | None:
    """This process's writer; None where another one writes. All modes give equal records.

    Parameters
    ----------
    mode
        "single": the main process writes all layers; what it writes has reached it anyway. "per_process": each
        writes those dealt to it, layer i process i mod P, into a file of its own. "parallel": the same layers,
        into one file through parallel HDF5, in the training's thread.
    head
        ``spectra.h5`` of the run.
    layers
        The model's layers, in order.
    attributes
        Of the root.
    side_folder
        Where the record goes on when it cannot be written; default the system's temporary folder.
    queue
        How many events may wait.
    comm
        For "parallel": an mpi4py communicator of all processes, on which nobody else sends; a collective call.
    """
    if mode == "single" and not world.is_main:
        return None
    place = (0, 1) if mode == "single" else (world.rank, world.size)
    side = side_path(head if mode == "single" else part_path(head, world.rank), side_folder)
    main: Store
    if mode == "parallel":
        main = ParallelStore(head, attributes, comm)
    elif mode == "per_process":
        main = PartStore(head, place, attributes)
    else:
        main = SegmentedFile(head, attributes)
    store = ResilientStore(main, SegmentedFile(side, attributes))
    return SpectraWriter(store, layers, mine=place, queue=queue)


def finish_record(mode: Mode, writer: SpectraWriter | None, head: Path, world: World) -> None:
    """At a run's end: as few files as can be, and one through which all are seen; a collective call."""
    if writer is not None:
        writer.finish()
    if mode != "per_process":
        return
    world.barrier()
    if world.is_main:
        try:
            write_master(head)
        except TROUBLE as error:
            log.warning("%s cannot be made of the processes' files (%s).", head, error)
