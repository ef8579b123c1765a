"""Standard output and error that cannot end a run: closed pipes, full disks, terminals without UTF-8."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO, cast


class TolerantStream:
    """A text stream whose writes are dropped from the first one on that fails; all else is the stream's own.

    The file descriptor then points to the null device, so that libraries that write there, and Python's last
    flush, do not fail either.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if the stream still can."""
        with self._until_it_fails():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if the stream still can."""
        with self._until_it_fails():
            self._stream.flush()

    @contextlib.contextmanager
    def _until_it_fails(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):
            # ValueError: the stream was closed.
            with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tolerate_output_failures() -> None:
    """Let nothing that happens to standard output or error end this process; for programs, not for libraries."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # It was closed before the start; the next file to be opened would take its number.
            stream = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
        if isinstance(stream, TolerantStream):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, cast(TextIO, TolerantStream(stream)))
