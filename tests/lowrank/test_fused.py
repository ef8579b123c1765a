"""The fused kernels, run by Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from support.mpirun import python_environment

pytest.importorskip("triton", reason="pip install --no-deps triton==3.6.0")
# More by hand: OIALR_CASES=200.
CASES = os.environ.get("OIALR_CASES", "4")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """What both tests look at, by one process: Triton reads the variable when a kernel is defined."""
    env = python_environment() | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "support.interpreted_kernels", CASES]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_output_and_all_gradients_against_float64(interpreted: dict[str, Any]) -> None:
    errors = interpreted["errors"]
    assert errors["float32"] < 1e-5
    assert errors["bfloat16"] < 1e-2
    assert errors["float16"] < 2e-3


def test_every_way_to_compute_gives_the_same_training_run(interpreted: dict[str, Any]) -> None:
    """The same r at every step; losses differ by rounding, which Muon's sign-like steps enlarge a little."""
    runs = interpreted["runs"]
    expected = runs.pop("three products")
    assert len(runs) == 5
    assert expected["r"][0] == {}
    assert len({str(r) for r in expected["r"]}) == 4, "before, at the conversion, and after two cuts"
    assert expected["losses"][-1] < 0.5 * expected["losses"][0]
    for name, run in runs.items():
        assert run["r"] == expected["r"], name
        assert run["losses"] == pytest.approx(expected["losses"], rel=1e-4), name


def test_where_the_kernels_do_not_run_torchs_products_are_used(caplog: pytest.LogCaptureFixture) -> None:
    from hpc_oialr.lowrank.kernels.fused import _is_faster

    assert not _is_faster(torch.device("cpu"), torch.bfloat16, 64, 32, 32, 16)
    assert "do not run here" in caplog.text
