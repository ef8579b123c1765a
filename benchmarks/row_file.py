"""A result file of one row a run, to which several processes may add at once."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpc_oialr.record.environment_report import environment_report

Row = dict[str, Any]


def key_of(row: Row, names: Sequence[str]) -> str:
    """What a run is known by: its values of ``names``."""
    return json.dumps({name: row[name] for name in names}, sort_keys=True)


class RowFile:
    """Whole at every moment; a row takes the place of an earlier one with the same values of ``key``."""

    def __init__(self, path: Path, key: Sequence[str]) -> None:
        self.path, self._key = path, key
        self._environment: dict[str, Any] | None = None

    def key(self, row: Row) -> str:
        """What a run is known by."""
        return key_of(row, self._key)

    def rows(self) -> list[Row]:
        """Finished runs; those left out or failed are tried again."""
        return [row for row in self.every_row() if "left_out" not in row and "failed" not in row]

    def add(self, row: Row) -> None:
        """Keep one more row, in place of an earlier one of the same run."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = [other for other in self.every_row() if self.key(other) != self.key(row)]
            draft = self.path.with_suffix(".tmp")
            self._environment = self._environment or environment_report()
            content = {"rows": [*rows, row], "environment": self._environment}
            draft.write_text(json.dumps(content, indent=1) + "\n")
            draft.replace(self.path)

    def every_row(self) -> list[Row]:
        """Those left out or failed too."""
        if not self.path.exists():
            return []
        rows: list[Row] = json.loads(self.path.read_text())["rows"]
        return rows
