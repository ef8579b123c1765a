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

_MOST_WAITING = 10_000  # lines that wait for room on the disk


class MetricsWriter:
    """Appends lines to ``path``; each is passed to the operating system whole before :meth:`write` returns.

    On a full disk: one warning, and the last 10,000 lines wait until it has room. A line torn by a kill is removed.
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
        warned = bool(self._waiting)
        self._waiting.append((to_json(record) + "\n").encode())
        try:
            self._append_waiting()
        except OSError as error:
            if not warned:
                log.warning("%s cannot be written (%s); its lines wait until it can.", self.path, error)

    def _append_waiting(self) -> None:
        content, before = b"".join(self._waiting), os.fstat(self._file.fileno()).st_size
        if self._file.write(content) != len(content):
            # Never a part of a line: the next one must begin a new line.
            os.ftruncate(self._file.fileno(), before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._waiting.clear()

    def truncate_after(self, step: int) -> None:
        """Drop records of later steps, which a run resumed from an older checkpoint writes again."""
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file.close()
        self._file = self.path.open("ab", buffering=0)

    def close(self) -> None:
        """Close the file; waiting lines are lost if there is still no room."""
        try:
            self._append_waiting()
        except OSError as error:
            log.warning("%s: %d lines are lost (%s).", self.path, len(self._waiting), error)
        self._file.close()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """All records of a file, also of one that is being written: a torn last line is left out.

    Damaged lines (zeros after a power loss, edits by hand) are left out too, with a warning that names them.
    """
    *lines, _ = Path(path).read_bytes().split(b"\n")
    return _records(lines, path)


def read_last_metrics(path: Path | str, *, size: int = 65_536) -> list[dict[str, Any]]:
    """As :func:`read_metrics`, but of the last ``size`` bytes: quick for a long run; none if there is no file."""
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
