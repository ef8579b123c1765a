from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_programs import Programs

from hpc_oialr.doctor import CheckContext

Made = Callable[..., CheckContext]


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    """An empty PATH."""
    return Programs(tmp_path / "bin")


@pytest.fixture
def context(programs: Programs, tmp_path: Path) -> Made:
    """Makes a context: variables as a mapping, the rest by name."""

    def make(environ: dict[str, str] | None = None, **settings: Any) -> CheckContext:
        variables = {"PATH": str(programs.path), **(environ or {})}
        return CheckContext(environ=variables, **{"folder": tmp_path / "runs", "timeout_s": 60.0, **settings})

    return make
