"""Standard output and error: failures that must not end a run, and messages of compiled libraries to drop.

Closed pipes, full disks and terminals without UTF-8 lose output, nothing else.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, cast


class _TolerantStream:
    """A text stream that drops its writes once one has failed.

    The file descriptor then points to the null device, so that libraries that write there, and Python's last
    flush, do not fail either.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, write: Callable[..., object], *text: str) -> None:
        try:
            write(*text)
        except (OSError, ValueError):
            # ValueError: the stream was closed.
            with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def tolerate_output_failures() -> None:
    """Let no failure of standard output or error end this process; for programs, not for libraries."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            # It was closed before the start; the next file to be opened would take its number.
            stream = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
        if isinstance(stream, _TolerantStream):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, cast(TextIO, _TolerantStream(stream)))


@contextlib.contextmanager
def without_lines(markers: Sequence[bytes]) -> Iterator[None]:
    """While active, drop lines that hold one of the markers from file descriptor 2, where C++ code writes directly.

    All other lines are held back and passed on at the end, in order, so use it around short pieces only.
    """
    _flush()
    try:
        kept = os.dup(2)
    except OSError:  # closed
        yield
        return
    try:
        with tempfile.TemporaryFile() as held:
            os.dup2(held.fileno(), 2)
            try:
                yield
            finally:
                _flush()
                os.dup2(kept, 2)
                held.seek(0)
                rest = b"".join(line for line in held if not any(marker in line for marker in markers))
                with contextlib.suppress(OSError):
                    while rest:
                        rest = rest[os.write(kept, rest) :]
    finally:
        os.close(kept)


def _flush() -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        sys.stderr.flush()
