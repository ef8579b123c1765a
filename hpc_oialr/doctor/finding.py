"""What a check found, and how to put it right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "problem"]
STATES: tuple[State, ...] = ("ok", "note", "problem")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table.

    Attributes
    ----------
    name
        What was looked at.
    state
        "ok"; "note": worth knowing, runs do without; "problem": a run would fail, hang or crawl.
    found
        What is the case.
    fix
        One line that puts it right; a problem always has one.
    """

    name: str
    state: State
    found: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.state in STATES, self.state
        assert self.fix or self.state != "problem", f"no fix for {self.name}"

    @property
    def severity(self) -> int:
        """0, 1 or 2, the worst."""
        return STATES.index(self.state)


def ok(name: str, found: str) -> Finding:
    """All is well."""
    return Finding(name, "ok", found)


def note(name: str, found: str, fix: str = "") -> Finding:
    """Worth knowing."""
    return Finding(name, "note", found, fix)


def problem(name: str, found: str, fix: str) -> Finding:
    """A run would fail, hang or crawl."""
    return Finding(name, "problem", found, fix)
