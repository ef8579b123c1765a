"""The fused kernels, run by Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="pip install --no-deps triton==3.6.0")
# More by hand: OIALR_CASES=200.
CASES = os.environ.get("OIALR_CASES", "24")


def test_output_and_all_gradients_against_float64() -> None:
    script = Path(__file__).parents[1] / "support" / "interpreted_kernels.py"
    done = subprocess.run(
        [sys.executable, script, CASES],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert errors["float32"] < 1e-5
    assert errors["bfloat16"] < 1e-2
    assert errors["float16"] < 2e-3


def test_where_the_kernels_do_not_run_torchs_products_are_used(caplog: pytest.LogCaptureFixture) -> None:
    from hpc_oialr.lowrank.kernels.fused import _is_faster

    assert not _is_faster(torch.device("cpu"), torch.float32, 64, 32, 32, 16)
    assert "do not run here" in caplog.text


def test_another_r_below_the_same_power_of_two_is_not_tuned_again() -> None:
    from hpc_oialr.lowrank.kernels.fused import _tuned

    def key(r: int, *, forward: bool) -> list[int]:
        P, Q = (
            (torch.empty(r, 20), torch.empty(12, r))
            if forward
            else (torch.empty(12, r).mT, torch.empty(20, r))
        )
        strides = dict(zip(("P_row", "P_col", "Q_row", "Q_col"), (*P.stride(), *Q.stride()), strict=True))
        return [strides[name] for name in _tuned.keys if name in strides]

    assert key(5, forward=True) == key(7, forward=True) != key(5, forward=False) == key(7, forward=False)
