"""A record that goes on elsewhere when its file cannot be written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

from hpc_oialr.spectra.join import rows_in
from hpc_oialr.spectra.names import make_side_folder, own
from hpc_oialr.spectra.reader import Spectra
from hpc_oialr.spectra.rows import Rows, together
from hpc_oialr.spectra.segments import SegmentedFile

log = logging.getLogger(__name__)

# What a file system and HDF5 raise.
TROUBLE = (OSError, RuntimeError, KeyError, ValueError)
MEMORY_BYTES = 64 * 2**20


class Store(Protocol):
    """Where rows go.

    Attributes
    ----------
    path
        Its file.
    collective
        Whether all processes must add rows together.
    """

    path: Path
    collective: bool

    def append(self, rows: Rows) -> None:
        """Add rows; they are on the disk when this returns."""

    def cut_after(self, t: int) -> None:
        """Drop rows of later steps."""

    def join(self) -> None:
        """Make it as few files as can be."""

    def close(self) -> None:
        """Let go of it."""


class ResilientStore:
    """Writes to the record's file while that can be done, then to a side file, then keeps rows in memory.

    Nothing here raises: a record never ends a training. Rows that are kept in memory are written at the next
    :meth:`settle` that finds room; beyond ``memory_bytes`` the newest are dropped and counted.

    Parameters
    ----------
    main
        The record.
    side
        Where it goes on, in a folder of this user's only.

    Attributes
    ----------
    written
        Events that are in one of the files.
    """

    def __init__(self, main: Store, side: SegmentedFile, *, memory_bytes: int = MEMORY_BYTES) -> None:
        self.main, self.side, self.memory_bytes = main, side, memory_bytes
        self.written = self.dropped = 0
        self._lost = False
        self._kept: list[Rows] = []

    def append(self, rows: Rows) -> None:
        """Add rows where it can be done."""
        if not self._kept and ((not self._lost and self._to_main(rows)) or self._to_side(rows)):
            return
        self._keep(rows)

    def settle(self) -> None:
        """Write what is kept in memory, if there is room now."""
        if not self._kept:
            return
        rows = together(self._kept)
        if (not self.main.collective and self._to_main(rows)) or self._to_side(rows):
            self._kept.clear()
            log.info("%s: what was kept in memory is written now.", self.main.path)

    def cut_after(self, t: int) -> None:
        """Drop rows of later steps, wherever they are."""
        self._bring_home()
        for store in (self.main, self.side):
            try:
                store.cut_after(t)
            except TROUBLE as error:
                log.warning("%s cannot be cut after step %d (%s).", store.path, t, error)

    def finish(self) -> None:
        """At a run's end: bring everything into the record's file, and make it one."""
        self.settle()
        if not self._bring_home():
            return
        try:
            self.main.join()
        except TROUBLE as error:
            log.warning(
                "%s and its segments stay apart (%s); readers see them as one. Once that is put right: "
                "oialr spectra merge %s",
                self.main.path,
                error,
                self.main.path.parent,
            )

    def close(self) -> None:
        """Let go of all files; tell what was lost."""
        self.settle()
        lost = self.dropped + sum(rows.events for rows in self._kept)
        if lost:
            log.warning("%s: %d events could be written nowhere and are lost.", self.main.path, lost)
        self.main.close()
        self.side.close()

    # -- where rows go ---------------------------------------------------------------------------

    def _to_main(self, rows: Rows) -> bool:
        try:
            self.main.append(rows)
        except TROUBLE as error:
            if not self._lost:
                self._warn(error)
            self._lost = True
            return False
        self._lost = False
        self.written += rows.events
        return True

    def _to_side(self, rows: Rows) -> bool:
        try:
            make_side_folder(self.side.path)
            self.side.append(rows)
        except TROUBLE as error:
            log.info("%s: %s", self.side.path, error)
            return False
        self.written += rows.events
        return True

    def _keep(self, rows: Rows) -> None:
        if not self._kept:
            log.warning(
                "Nor can %s be written: up to %d MiB of the record stay in memory until a checkpoint finds room.",
                self.side.path,
                self.memory_bytes >> 20,
            )
        if sum(kept.nbytes for kept in self._kept) + rows.nbytes > self.memory_bytes:
            self.dropped += rows.events
        else:
            self._kept.append(rows)

    def _warn(self, error: Exception) -> None:
        log.warning(
            "%s cannot be written (%s); the training goes on, and the record continues in %s. Once there is room: "
            "oialr spectra merge %s",
            self.main.path,
            error,
            self.side.path,
            self.main.path.parent,
        )

    def _bring_home(self) -> bool:
        """Move the rows of the side file into the record; True if none are left there."""
        if not (own(self.side.path.parent) and own(self.side.path)):
            return True
        try:
            if self.main.collective:
                raise OSError("all processes would have to write it together")
            with Spectra(self.side.path) as run:
                self.main.append(rows_in(run))
            self.side.remove()
        except TROUBLE as error:
            log.warning(
                "%s holds a part of %s, which cannot take it now (%s). Once it can: oialr spectra merge %s",
                self.side.path,
                self.main.path,
                error,
                self.main.path.parent,
            )
            return False
        self._lost = False
        return True
