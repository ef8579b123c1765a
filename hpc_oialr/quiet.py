"""Keep known chatter of compiled libraries off standard error, and nothing else."""

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
    they are held back until then, so use it around short pieces only.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            held.seek(0)
            rest = b"".join(line for line in held if not any(marker in line for marker in markers))
            with os.fdopen(kept, "wb") as stream:
                stream.write(rest)
