"""Drop known messages of compiled libraries from standard error, and nothing else."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def without_lines(markers: Sequence[bytes]) -> Iterator[None]:
    """Drop lines that hold one of the markers from what is written to file descriptor 2 meanwhile.

    C++ code writes there past ``sys.stderr``. All other lines are passed on at the end, in order;
    they are held back until then, so use it around short pieces only. A standard error that is closed, full or
    belongs to a terminal that is gone loses them: no output may end a run.
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
