"""Programs that are missing, cannot be started, hang or are interrupted."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpc_oialr.commands import run_command


def test_what_a_program_says() -> None:
    answer = run_command(["sh", "-c", "cat; echo two >&2; exit 3"], timeout_s=60, text="one")
    assert (answer.stdout, answer.stderr, answer.code, answer.reason) == ("one", "two\n", 3, "two")


def test_a_program_that_cannot_be_started(tmp_path: Path) -> None:
    assert run_command(["no-such-program"], timeout_s=60).trouble == "missing"
    (tmp_path / "plain").write_text("text")
    refused = run_command([str(tmp_path / "plain")], timeout_s=60)
    assert (refused.trouble, refused.code) == ("refused", None)
    assert "Permission denied" in refused.reason


def test_a_program_that_hangs_is_ended() -> None:
    answer = run_command(["sh", "-c", "echo so far; sleep 600"], timeout_s=0.5)
    assert (answer.stdout, answer.code, answer.reason) == ("so far\n", None, "no answer in time")


def test_ctrl_c_ends_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[str]] = []

    def interrupted(process: subprocess.Popen[str], *_: Any, **__: Any) -> None:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_command(["sleep", "600"], timeout_s=60)
    with started[0] as process:
        assert process.wait(timeout=60) == -signal.SIGKILL
