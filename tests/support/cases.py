"""How many random cases a test tries: the few that fit into a run of all tests, or as many as someone asks for."""

from __future__ import annotations

import os


def seeds(few: int) -> range:
    """A seed for each case, from 0 on; ``OIALR_CASES=1500``: so many, ``OIALR_CASES=1500@7000``: and from another one."""
    count, _, first = os.environ.get("OIALR_CASES", str(few)).partition("@")
    return range(int(first or 0), int(first or 0) + int(count))
