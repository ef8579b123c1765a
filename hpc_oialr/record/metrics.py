"""``metrics.jsonl``: one JSON object a line, whole lines only, no step twice."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_oialr.record.files import to_json, write_atomically

log = logging.getLogger(__name__)

# Lines that wait for room on the disk.
_MOST_WAITING = 10_000


class MetricsWriter:
    """Appends lines; each is handed to the operating system whole before :meth:`write` returns.

    A disk that is full does not end the training: one warning, and lines wait, the last ones, until it has room.

    Parameters
    ----------
    path
        The file; created if missing. A last line torn by a kill is removed.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if os.path.lexists(self.path) and not self.path.is_file():
            # A folder cannot be opened, a pipe would wait for its reader.
            aside = next(name for i in range(1000) if not os.path.lexists(name := Path(f"{path}.aside{i}")))
            self.path.rename(aside)
            log.warning("%s was no regular file; it is %s now.", self.path, aside.name)
        self._file = self.path.open("ab", buffering=0)
        self._waiting: deque[bytes] = deque(maxlen=_MOST_WAITING)
        os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record, which must hold an integer ``step``; NaN becomes null."""
        assert isinstance(record["step"], int)
        told = bool(self._waiting)
        self._waiting.append((to_json(record) + "\n").encode())
        try:
            self._append_waiting()
        except OSError as error:
            if not told:
                log.warning("%s cannot be written (%s); its lines wait until it can.", self.path, error)

    def _append_waiting(self) -> None:
        content, before = b"".join(self._waiting), os.fstat(self._file.fileno()).st_size
        if self._file.write(content) != len(content):
            # Not a part of a line: what comes later must begin a new one.
            os.ftruncate(self._file.fileno(), before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting.clear()

    def truncate_after(self, step: int) -> None:
        """Drop records of later steps, as a run does that goes on from an older checkpoint."""
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file.close()
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        """Close the file; lines that still wait are lost if there is no room now."""
        try:
            self._append_waiting()
        except OSError as error:
            log.warning("%s: %d lines are lost (%s).", self.path, len(self._waiting), error)
        self._file.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """All records of a file, also of one that is being written: a torn last line is left out.

    Damaged lines are left out too, with a warning that names them: zeros, as a node that lost its power leaves
    them, or what an editor did.
    """
    *lines, _ = Path(path).read_bytes().split(b"\n")
    return _records(lines, path)


def read_last_metrics(path: Path | str, *, size: int = 65_536) -> list[dict[str, Any]]:
    """As :func:`read_metrics`, of a file's last bytes: quick for a long run; none if there is no file."""
    try:
        with Path(path).open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - size)
            file.seek(start)
            _, *lines = ((b"" if start else b"\n") + file.read()).split(b"\n")
    except FileNotFoundError:
        return []
    return _records(lines[:-1], path, last=bool(start))


def _records(lines: list[bytes], path: Path | str, *, last: bool = False) -> list[dict[str, Any]]:
    """Records of whole lines; ``last`` if these are the last lines of more."""
    records, bad = [], []
    for number, line in enumerate(lines):
        try:
            # A block of zeros may stand before a line that is whole.
            record: Any = json.loads(line.strip(b"\0"))
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        else:
            bad.append(number)
    if bad:
        where = f"line {bad[0] - len(lines)} from the end" if last else f"line {bad[0] + 1}"
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        log.warning("%s of %s%s: no JSON object with a step; left out.", where, path, more)
    return records
