"""A plan's rows as a file."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_oialr.outputs import claim, marked, new_file
from hpc_oialr.record.files import to_json

_PLAN = marked("a plan", b'{\n "recipe": ', b"engine,nodes,processes,", mark=b"global_batch")


def claim_plan(path: Path, inputs: Sequence[Path | str] = (), *, force: bool = False) -> Path:
    """Where a plan may be written; see :func:`hpc_oialr.outputs.claim`."""
    return claim(path, _PLAN, inputs=inputs, force=force)


def write(
    rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], path: Path, *, force: bool = False
) -> None:
    """JSON with what the plan was made of, or the rows alone as CSV, by the file's ending.

    Raises
    ------
    OutputError
        If the path holds something else than an earlier plan, and ``force`` is not set.
    """
    target = claim_plan(path, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        table.writeheader()
        table.writerows(rows)
        content = text.getvalue()
    else:
        content = to_json({**about, "rows": list(rows)}, indent=1) + "\n"
    with new_file(target) as draft:
        draft.write_text(content, encoding="utf-8")
