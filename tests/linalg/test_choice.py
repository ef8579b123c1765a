"""Which method is chosen, what it says, what it will take, and what happens when one process fails."""

from __future__ import annotations

import pytest
import torch
from support.svd_cases import best_error, spectrum, with_spectrum
from support.threads import outcomes, run_threads

from hpc_oialr.errors import ConfigError, NonFiniteError
from hpc_oialr.linalg import hierarchical, tsqr
from hpc_oialr.linalg.distributed_svd import (
    WORKING_BYTES,
    choose,
    distributed_svd,
    forecast_bytes,
)
from hpc_oialr.linalg.methods import Gather, Hierarchical, Method, Randomized, Tsqr
from hpc_oialr.linalg.row_partition import RowPartition

TALL, SQUARE, WIDE = (
    RowPartition((32768, 32768), 512),
    RowPartition((512, 512), 1024),
    RowPartition((64, 64), 9000),
)
METHODS: list[Method] = [
    Tsqr(),
    Gather(),
    Tsqr(r=3),
    Gather(tolerance=0.2),
    Hierarchical(r=3),
    Hierarchical(tolerance=0.2),
    Randomized(r=3, oversampling=3),
]


@pytest.mark.parametrize(
    ("partition", "target", "method", "reason"),
    [
        (TALL, {}, Tsqr(), "all 512 triplets, 56 GFlop a process against 106 for Gather"),
        (WIDE, {}, Tsqr(), "all 128 triplets"),
        (SQUARE, {}, Gather(), "against 38.7 for Tsqr"),
        (TALL, {"r": 32}, Randomized(r=32), "r = 32 with oversampling is at most a quarter of k = 512"),
        (TALL, {"r": 300}, Tsqr(r=300), "all 512 triplets"),
        (TALL, {"tolerance": 0.1}, Hierarchical(tolerance=0.1), "the relative error 0.1 decides how many"),
        (RowPartition((4096,), 512), {}, Tsqr(), "all 512 triplets on one process"),
    ],
)
def test_choice(partition: RowPartition, target: dict[str, float], method: Method, reason: str) -> None:
    choice = choose(partition, torch.float32, **target)  # type: ignore[arg-type]
    assert choice.method == method
    assert reason in choice.reason
    assert choice.forecast_bytes == forecast_bytes(method, partition, torch.float32)
    assert str(choice).startswith(f"{type(method).__name__}(")
    assert str(choice).endswith("GiB on the fullest process")


def test_what_does_not_fit_gives_way() -> None:
    small = choose(SQUARE, torch.float32, r=500)
    assert small.method == Gather(r=500)
    sketch = Randomized(r=500)
    limit = forecast_bytes(sketch, SQUARE, torch.float32)
    choice = choose(SQUARE, torch.float32, r=500, memory_limit_bytes=limit)
    assert choice.method == sketch
    assert choice.reason.endswith("Gather does not fit; Tsqr does not fit")


def test_nothing_fits() -> None:
    message = (
        r"memory_limit_bytes is 1000; must be at least what a method needs for fc1 \(1024 x 1024\) on 2 "
        r"process\(es\): Gather 0\.\d+ GiB, Tsqr 0\.\d+ GiB\. Use more processes"
    )
    with pytest.raises(ConfigError, match=message):
        choose(SQUARE, torch.float32, memory_limit_bytes=1000, name="fc1")
    told = outcomes(2, lambda c: distributed_svd(torch.ones(9, 4), c, memory_limit_bytes=[9e9, 10][c.rank]))
    assert told[0] == told[1]
    assert told[0].startswith("ConfigError: memory_limit_bytes is 10; must be at least")
    with pytest.raises(ConfigError, match="memory_limit_bytes is 10; .*Randomized"):
        distributed_svd(torch.ones(9, 4), method=Randomized(r=1), memory_limit_bytes=10)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(("m", "n"), [(60, 12), (12, 60)])
def test_every_method_through_the_front_door(method: Method, size: int, m: int, n: int) -> None:
    A = with_spectrum(m, n, spectrum("falling", 12))
    parts = A.tensor_split(size)
    found = run_threads(size, lambda c: distributed_svd(parts[c.rank], c, method=method))
    U, (_, s, Vh, error) = torch.cat([part.U for part in found]), found[0]
    true = float(torch.linalg.matrix_norm(A - (U * s) @ Vh))
    assert true == pytest.approx(error, abs=1e-6)
    if method.r is not None:
        assert len(s) == 3
        assert true <= best_error(A, 3) * 1.02
    elif not isinstance(method, Randomized) and method.tolerance is not None:
        assert true <= 0.2 * float(torch.linalg.matrix_norm(A)) < best_error(A, len(s) - 2)
    else:
        assert (len(s), error) == (12, 0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tsqr(r=0), "r is 0; must be at least 1. It counts singular values."),
        (lambda: Gather(r=1, tolerance=0.1), "target is 'r = 1, tolerance = 0.1'; exactly one of r and"),
        (lambda: Hierarchical(), "target is 'r = None, tolerance = None'; exactly one of r and tolerance"),
        (
            lambda: Hierarchical(tolerance=1.5),
            "tolerance is 1.5; must lie in [0, 1). It is relative to ||A||",
        ),
        (lambda: Hierarchical(r=2, shift=-1), "shift is -1; must be 0 or more. 10 is the default."),
        (lambda: Randomized(r=0), "r is 0; must be at least 1."),
        (lambda: Randomized(r=1, oversampling=-2), "oversampling is -2; must be at least 0."),
        (lambda: Randomized(r=1, power_iterations=-1), "power_iterations is -1; must be at least 0."),
        (
            lambda: distributed_svd(torch.ones(3, 2), method="tsqr"),
            "method is 'tsqr'; must be a Gather, Tsqr",
        ),
        (
            lambda: distributed_svd(torch.ones(3, 2), method=Tsqr(), r=1),
            "target is 'r = 1, tolerance = None'",
        ),
        (lambda: distributed_svd(torch.ones(3, 2), r=1, tolerance=0.1), "target is 'r = 1, tolerance = 0.1'"),
    ],
)
def test_settings_out_of_range(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_one_process_without_convergence_stops_all(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """A leaf's SVD fails (hierarchical), or the root's (TSQR); nobody waits for ever."""
    original = tsqr.svd

    def fails(A: torch.Tensor, *, name: str) -> object:
        if bool((A.max() == A).any()) and float(A.abs().max()) > 100:
            raise NonFiniteError("did not converge")
        return original(A, name=name)

    for module in (tsqr, hierarchical):
        monkeypatch.setattr(module, "svd", fails)
    blocks = [torch.randn(6, 4) * (1000 if rank == failing else 1) for rank in range(4)]
    for method in (Tsqr(), Hierarchical(r=2)):
        told = outcomes(4, lambda c, m=method: distributed_svd(blocks[c.rank], c, method=m, name="fc1"))
        assert len(set(told)) == 1
        assert told[0].startswith("NonFiniteError: no factorisation of fc1 converged on one of 4 processes")


def test_forecast_grows_with_what_it_depends_on() -> None:
    for method in (Tsqr(), Gather(), Hierarchical(r=8), Randomized(r=8)):
        fp32, fp64, bf16 = (
            forecast_bytes(method, TALL, d) for d in (torch.float32, torch.float64, torch.bfloat16)
        )
        assert fp64 - WORKING_BYTES == 2 * (fp32 - WORKING_BYTES)
        assert bf16 == fp32 + 4 * 32768 * 512
    # A wide matrix in blocks never costs a process more than a few of its blocks and the result.
    wide = forecast_bytes(Tsqr(), RowPartition((16,) * 64, 1 << 20), torch.float32)
    assert wide < 4 * (6 * 16 + 2 * 1024) * (1 << 20) * 1.1  # bytes
