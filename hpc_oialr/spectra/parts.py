"""A record of which each process writes the layers dealt to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpc_oialr.spectra.names import part_path, parts_of
from hpc_oialr.spectra.segments import SegmentedFile


class PartStore(SegmentedFile):
    """One process's file; it also looks after files that no process of this run writes any more.

    A run that goes on with fewer processes finds the files of all it had before.

    Parameters
    ----------
    head
        The record's head, beside which the file lies.
    place
        This process's number and the count of processes.
    attributes
        Of the root.
    """

    def __init__(self, head: Path, place: tuple[int, int], attributes: Mapping[str, Any]) -> None:
        super().__init__(part_path(head, place[0]), attributes)
        self._record, self._place = head, place

    def cut_after(self, t: int) -> None:
        """Drop rows of later steps, in files left behind too; the first process drops an old master."""
        if self._place[0] == 0:
            self._record.unlink(missing_ok=True)
        super().cut_after(t)
        for file in self._left_behind():
            file.cut_after(t)

    def join(self) -> None:
        """Make one plain file of each."""
        super().join()
        for file in self._left_behind():
            file.join()

    def _left_behind(self) -> Iterator[SegmentedFile]:
        rank, size = self._place
        earlier = len(parts_of(self._record)) and max(_rank(path) for path in parts_of(self._record)) + 1
        for other in range(rank + size, earlier, size):
            yield SegmentedFile(part_path(self._record, other))


def _rank(part: Path) -> int:
    return int(part.suffixes[-2].removeprefix(".p"))
