"""Tests that need a GPU. ``OIALR_TEST_DEVICE=cpu`` runs their bodies on the CPU, so that none is untried code."""

from __future__ import annotations

import os

import pytest
import torch

WANTED = os.environ.get("OIALR_TEST_DEVICE", "cuda")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if WANTED.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def pytest_itemcollected(item: pytest.Item) -> None:
    # A GPU is at hand for minutes: a new warning of another torch or driver is shown, and hides no result.
    item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture
def device() -> torch.device:
    """Where a test computes."""
    return torch.device(WANTED)


@pytest.fixture(autouse=True)
def _settings_as_before() -> object:
    """A test may switch TF32 on; the next one begins with torch's own settings."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
