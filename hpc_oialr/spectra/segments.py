"""One record as a plain HDF5 file that grows by renames: a head, and closed segments before it."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_oialr.errors import DataError
from hpc_oialr.record.files import write_atomically
from hpc_oialr.spectra.join import join
from hpc_oialr.spectra.layout import append, cut_after, describe, last_step, takes_rows
from hpc_oialr.spectra.memory_file import Image
from hpc_oialr.spectra.names import segment_path, segments_of
from hpc_oialr.spectra.pieces import Piece
from hpc_oialr.spectra.rows import Rows

log = logging.getLogger(__name__)

HEAD_BYTES = 8 * 2**20


class SegmentedFile:
    """A record that is whole on the disk at any moment.

    HDF5 changes a file in place, and one killed meanwhile may never open again. So the head lives in memory;
    rows are added there, and its bytes then take the old file's place in one rename. After a kill at any moment
    the file opens and holds all rows whose :meth:`append` had returned, and others may read it at any moment.
    HDF5 never opens the path, so that file locks, which many parallel file systems lack, do not matter.

    HDF5's own answer, SWMR, was tried (thirty kills on a local disk): all rows were there, but a killed writer
    leaves its file marked as open, so that plain readers, and a run that goes on, are refused until ``h5clear``
    was run by hand. Neither new layers nor the cut at a resume fit its rules (append only, to data sets that were
    there before), and it asks for a file system that keeps the order of writes, which NFS and Lustre do not.

    A head that has reached ``head_bytes`` is closed: it becomes segment 001, 002, ... beside the path, never
    changed any more, and a new head begins. So rows cost at most the head's size, however long the run. The
    head says how many segments come before it, which makes each of these changes one rename.

    Parameters
    ----------
    path
        The head, e.g. ``spectra.h5``. Nothing is written before the first row comes; what lies there is gone on
        with. A damaged head is moved aside, with a warning.
    attributes
        Of the root of every new file.
    head_bytes
        See above.
    """

    collective = False

    def __init__(
        self, path: Path | str, attributes: Mapping[str, Any] | None = None, *, head_bytes: int = HEAD_BYTES
    ) -> None:
        self.path, self.head_bytes = Path(path), head_bytes
        self._attributes = dict(attributes or {})
        self._head: Image | None = None
        self._checked = False
        self._seen = _inode(self.path)

    def append(self, rows: Rows) -> None:
        """Add rows; when this returns they are on the disk.

        Raises
        ------
        OSError
            If they could not be written; the files are as before.
        """
        if self._head is not None and _inode(self.path) != self._seen:
            # Somebody has merged the record.
            self.close()
        try:
            head = self._head or self._open()
            append(head, rows)
            content = head.content()
            write_atomically(self.path, content)
            self._seen = _inode(self.path)
        except BaseException:
            # What is in memory is ahead of the disk now.
            self.close()
            raise
        self._head = head
        if len(content) >= self.head_bytes:
            self._close_segment(int(head.file.attrs["segments"]))

    def cut_after(self, t: int) -> None:
        """Drop rows of later steps, as a run does that goes on from an older checkpoint."""
        self.close()
        self._put_aside_damaged()
        for number, path in self._chain():
            if self._reaches_past(path, t):
                self._cut(path, number, t)
                return

    def join(self) -> None:
        """Make one plain file of the head and its segments.

        Raises
        ------
        DataError
            If one of them is damaged; all stay as they are.
        """
        self.close()
        paths = [path for _, path in self._chain()]
        if paths and paths != [self.path]:
            join(paths, self.path)
            self._remove_segments(1)

    def close(self) -> None:
        """Let go of the head in memory; what had been written stays."""
        if self._head is not None:
            self._head.close()
            self._head = None

    def close_head(self) -> None:
        """Make the head a segment too, without a new head after it."""
        self.close()
        chain = self._chain()
        if chain and chain[-1][1] == self.path:
            self.path.replace(segment_path(self.path, chain[-1][0]))

    def remove(self) -> None:
        """Delete all its files."""
        self.close()
        self.path.unlink(missing_ok=True)
        self._remove_segments(1)

    # -- the head --------------------------------------------------------------------------------

    def _open(self) -> Image:
        """The head in memory, ready for rows."""
        self._put_aside_damaged()
        if not self.path.exists():
            return self._new(len(segments_of(self.path)))
        if self.path.stat().st_size < self.head_bytes:
            head = Image(self.path.read_bytes())
            if takes_rows(head.file):
                return head
            head.close()
        with contextlib.closing(Piece(self.path)) as piece:
            segments = int(piece.attributes.get("segments", 0))
        return self._close_segment(segments)

    def _new(self, segments: int) -> Image:
        head = Image()
        describe(head.file, self._attributes, segments)
        return head

    def _close_segment(self, before: int) -> Image:
        """Keep the file at the path as a segment and begin a new head, which is not written yet.

        A reader finds the same rows under either name until then, and counts them once.
        """
        self.close()
        segment = segment_path(self.path, before + 1)
        link = segment.with_name(f".{segment.name}.tmp")
        link.unlink(missing_ok=True)
        try:
            os.link(self.path, link)
        except OSError:
            # A file system without hard links.
            write_atomically(segment, self.path.read_bytes())
        else:
            link.replace(segment)
        self._head = self._new(before + 1)
        return self._head

    def _put_aside_damaged(self) -> None:
        if self._checked or not self.path.exists():
            return
        try:
            # All of it: a damaged chunk shows only when it is read.
            with contextlib.closing(Piece(self.path)) as piece:
                piece.read_all()
        except DataError as error:
            aside = _free_name(self.path)
            self.path.replace(aside)
            log.warning("%s It was moved to %s, and a new file begun.", error, aside.name)
        self._checked = True

    # -- segments --------------------------------------------------------------------------------

    def _chain(self) -> list[tuple[int, Path]]:
        """Numbers and paths of the closed segments that count, then of the head."""
        if not self.path.exists():
            return list(segments_of(self.path).items())
        with contextlib.closing(Piece(self.path)) as piece:
            count = int(piece.attributes.get("segments", 0))
        paths = [segment_path(self.path, number) for number in range(1, count + 1)]
        return list(enumerate([*paths, self.path], start=1))

    def _reaches_past(self, path: Path, t: int) -> bool:
        try:
            with contextlib.closing(Piece(path)) as piece, piece.reading("the steps of events"):
                return last_step(piece.file) > t
        except (DataError, FileNotFoundError) as error:
            # The run goes on, and the reader will tell again.
            log.warning("%s", error)
            return False

    def _cut(self, path: Path, number: int, t: int) -> None:
        """Make the part of a file up to step ``t`` the head, and forget all that came after it."""
        if path.stat().st_size >= self.head_bytes:
            join([path], self.path, segments=number - 1, until=t)
        else:
            with contextlib.closing(Image(path.read_bytes())) as head:
                cut_after(head.file, t)
                head.file.attrs["segments"] = number - 1
                write_atomically(self.path, head.content())
        self._remove_segments(number)

    def _remove_segments(self, first: int) -> None:
        for number, path in segments_of(self.path).items():
            if number >= first:
                path.unlink(missing_ok=True)


def _inode(path: Path) -> int | None:
    """Another one once the file has been replaced."""
    return path.stat().st_ino if path.exists() else None


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}.damaged{number}") for number in range(1, 1_000_000))
    return next(name for name in names if not name.exists())
