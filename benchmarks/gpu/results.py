"""The result file: rewritten as a whole after every row, so that whatever ends the run loses at most one."""

from __future__ import annotations

import json
import math
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Row
from hpc_oialr.record.environment_report import environment_report

KIND = "benchmarks.gpu"


class Results:
    """Sections of rows, in memory and on disk.

    Parameters
    ----------
    out
        The file, or None to keep rows in memory only. A file of an earlier run on the same card keeps the
        sections that are not run again; a section that is run again is replaced by its first new row.

    Raises
    ------
    ValueError
        If the file holds something else: no result of this benchmark, or one of another card or size.
    """

    def __init__(self, out: Path | None, card: str, *, tiny: bool) -> None:
        self.out = out
        self.content: dict[str, Any] = {"kind": KIND, "card": card, "tiny": tiny, "sections": {}}
        if out is not None and out.exists():
            self.content["sections"] = self._earlier(out, card, tiny)["sections"]
        self.content["environment"] = environment_report()
        self.write()

    @staticmethod
    def _earlier(out: Path, card: str, tiny: bool) -> dict[str, Any]:
        content = load(out)
        held = (content["card"], content["tiny"])
        if held != (card, tiny):
            size = {True: "tiny size", False: "full size"}
            raise ValueError(
                f"{out} holds results of {held[0]} in {size[held[1]]}, this run is on {card} in {size[tiny]}; "
                "choose another --out."
            )
        return content

    def section(self, name: str) -> Section:
        """A section to be filled."""
        return Section(self, name)

    @property
    def sections(self) -> dict[str, Any]:
        """What was measured, by name of the section."""
        sections: dict[str, Any] = self.content["sections"]
        return sections

    def write(self) -> None:
        """Put the file in place in one move."""
        if self.out is None:
            return
        self.out.parent.mkdir(parents=True, exist_ok=True)
        draft = self.out.with_name(f"{self.out.name}.{os.getpid()}.tmp")
        draft.write_text(json.dumps(self.content, indent=1) + "\n")
        draft.replace(self.out)


class Section:
    """Rows of one section, what was left out of it, and its errors."""

    def __init__(self, results: Results, name: str) -> None:
        self._results, self._name = results, name
        self.content: dict[str, Any] = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "torch": torch.__version__,
            "seconds": 0.0,
            "rows": [],
            "left out": [],
            "errors": [],
        }

    def add(self, row: Row) -> None:
        """One more row, on disk when this returns."""
        self.content["rows"].append({key: _plain(value) for key, value in row.items()})
        self.save()

    def leave_out(self, case: str, reason: str) -> None:
        """A case that was not measured, or not to its end."""
        self.content["left out"].append(f"{case}: {reason}")
        self.save()

    def fail(self, case: str, message: str) -> None:
        """A case that raised."""
        self.content["errors"].append({"case": case, "error": message})
        self.save()

    def save(self, *, seconds: float | None = None) -> None:
        """Write the file; an earlier run's rows of this section stay until there is a new one."""
        if seconds is not None:
            self.content["seconds"] = round(seconds, 2)
        earlier = self._results.sections.get(self._name)
        if self.content["rows"] or earlier is None or not earlier["rows"]:
            self._results.sections[self._name] = self.content
        else:
            # Nothing is replaced by nothing, but what went wrong this time is said.
            earlier["left out"], earlier["errors"] = self.content["left out"], self.content["errors"]
        self._results.write()


def _plain(value: Any) -> Any:
    """What JSON has no number for, as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def load(path: Path) -> dict[str, Any]:
    """A result file of this benchmark.

    Raises
    ------
    ValueError
        If it is none.
    """
    try:
        content = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of python -m benchmarks.gpu: {error}.") from error
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise ValueError(f"{path} is no result of python -m benchmarks.gpu: it has no kind {KIND!r}.")
    return content
