"""Files that are whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes | str) -> None:
    """Replace a file at once: a reader, also after a kill, finds the old or the new one. OSError: the old one is kept."""
    try:
        with draft_of(path) as draft, draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            # Without this a node that loses power may keep the new name without its content.
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A temporary name, renamed to ``path`` at the end, removed after an error."""
    draft = path.with_name(f".{path.name}.tmp")
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        # On a full disk a partial file takes room.
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def to_json(value: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities become null.

    >>> to_json({"loss": float("nan"), "r": {"head": 4}})
    '{"loss": null, "r": {"head": 4}}'
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item"):  # numpy's and torch's scalars
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value
