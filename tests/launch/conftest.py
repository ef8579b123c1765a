from __future__ import annotations

import signal

import pytest
from support.fake_slurm import FakeSlurm


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's programs, and a folder of one's own to work in."""
    monkeypatch.chdir(tmp_path)
    return FakeSlurm(tmp_path / "slurm", monkeypatch)


@pytest.fixture
def signals():
    """Handlers as before, afterwards."""
    numbers = (signal.SIGTERM, signal.SIGCONT, signal.SIGUSR2, signal.SIGURG, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
