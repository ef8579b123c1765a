"""SVD of a matrix in row blocks: chooses a method, forecasts its memory, says why, and runs it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hpc_oialr.errors import ConfigError
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.communicator import Communicator, Group
from hpc_oialr.linalg.groups import communicator
from hpc_oialr.linalg.hierarchical import check_target, fewest, hierarchical_svd
from hpc_oialr.linalg.methods import Gather, Hierarchical, Method, Randomized, Tsqr, check_method
from hpc_oialr.linalg.randomized import randomized_svd
from hpc_oialr.linalg.row_partition import RowPartition, agree
from hpc_oialr.linalg.svd import compute_dtype
from hpc_oialr.linalg.tsqr import BlockSVD, Columns, gathered_svd, tsqr_svd

# A sketch wider than this share of k costs about as much as the exact SVD and is less accurate.
SKETCH_SHARE = 0.25
# Buffers of the BLAS and of messages, and pieces of the screening, whatever the matrix.
WORKING_BYTES = 12 << 20
GIB = 1 << 30


@dataclass(frozen=True)
class Choice:
    """A method, why it was chosen, and the memory it will take on the fullest process (bytes)."""

    method: Method
    reason: str
    forecast_bytes: int

    def __str__(self) -> str:
        given = ((f.name, getattr(self.method, f.name)) for f in fields(self.method))
        settings = ", ".join(f"{name}={value}" for name, value in given if value is not None)
        title = f"{type(self.method).__name__}({settings})"
        return f"{title}: {self.reason}; {self.forecast_bytes / GIB:.3g} GiB on the fullest process"


@exact_arithmetic()
def distributed_svd(
    A: Tensor,
    group: Group = None,
    *,
    method: Method | None = None,
    r: int | None = None,
    tolerance: float | None = None,
    vh: Columns = "whole",
    memory_limit_bytes: float | None = None,
    name: str = "matrix",
) -> BlockSVD:
    """Thin or truncated SVD of a matrix in row blocks.

    Parameters
    ----------
    A
        This process's rows, m_p x n, any floating dtype; bf16 and fp16 are computed in fp32.
    group
        See :func:`~hpc_oialr.linalg.communicator.communicator`.
    method
        One of the types in :mod:`~hpc_oialr.linalg.methods`; default what :func:`choose` says.
    r, tolerance
        Triplets wanted, or relative Frobenius error allowed; neither means all. Only without ``method``,
        which has its own.
    vh
        "whole" gives every process all of Vh, "block" its columns only.
    memory_limit_bytes
        For each process beside its block, e.g. of ``torch.cuda.mem_get_info``; the smallest of all counts.
    name
        Named in errors.

    Raises
    ------
    NonFiniteError, WorldError
        On every process, if any block holds NaN or Inf, or blocks do not fit together.
    ConfigError
        If settings contradict each other or the forecast exceeds the limit; before any work.

    Notes
    -----
    Where a factorisation does not converge :func:`~hpc_oialr.linalg.svd.svd` tries the next one of its chain.

    Examples
    --------
    >>> A = torch.outer(torch.arange(6.0), torch.ones(4))
    >>> distributed_svd(A, r=1).s
    tensor([14.8324])
    """
    comm = communicator(group)
    if method is not None:
        check_method(method)
        if r is not None or tolerance is not None:
            given = f"r = {r}, tolerance = {tolerance}"
            raise ConfigError("target", given, "must be None beside a method", fix="Set it in the method.")
    A, partition = agree(A, comm, name)
    mine = math.inf if memory_limit_bytes is None else memory_limit_bytes
    limit = float(comm.all_reduce(torch.tensor(mine, dtype=torch.float64, device=A.device), op="min"))
    if method is None:
        method = choose(
            partition, A.dtype, r=r, tolerance=tolerance, memory_limit_bytes=limit, name=name
        ).method
    elif forecast_bytes(method, partition, A.dtype) > limit:
        raise _too_large([method], partition, A.dtype, limit, name)
    return _run(method, A, comm, vh, name)


def choose(
    partition: RowPartition,
    dtype: torch.dtype,
    *,
    r: int | None = None,
    tolerance: float | None = None,
    memory_limit_bytes: float = math.inf,
    name: str = "matrix",
) -> Choice:
    """The method :func:`distributed_svd` takes; a pure function, so all processes agree without a message.

    A tolerance calls for Hierarchical. So few triplets that a sketch is at most a quarter of k: Randomized.
    Otherwise Tsqr or Gather, whichever has fewer operations one after another. What does not fit in
    memory gives way to the next one in that order.

    Raises
    ------
    ConfigError
        If none fits; it lists what each would need.

    Examples
    --------
    >>> print(choose(RowPartition((32768, 32768), 512), torch.float32))
    Tsqr(): all 512 triplets, 56 GFlop a process against 106 for Gather; 0.2 GiB on the fullest process
    """
    if r is not None or tolerance is not None:
        check_target(r, tolerance, 0)
    rejected: list[Method] = []
    for method, reason in _preferences(partition, r, tolerance):
        forecast = forecast_bytes(method, partition, dtype)
        if forecast <= memory_limit_bytes:
            skipped = [type(other).__name__ for other in rejected]
            return Choice(method, "; ".join([reason, *(f"{o} does not fit" for o in skipped)]), forecast)
        rejected.append(method)
    raise _too_large(rejected, partition, dtype, memory_limit_bytes, name)


def forecast_bytes(method: Method, partition: RowPartition, dtype: torch.dtype) -> int:
    """Peak memory of the fullest process beside its input block (bytes)."""
    cast = max(partition.rows) * partition.n if dtype != compute_dtype(dtype) else 0
    return (method.numbers(partition) + cast) * compute_dtype(dtype).itemsize + WORKING_BYTES


def _preferences(partition: RowPartition, r: int | None, tolerance: float | None) -> list[tuple[Method, str]]:
    exact = _exact(partition, r, tolerance)
    if tolerance is not None:
        reason = f"the relative error {tolerance:g} decides how many triplets stay"
        return [(Hierarchical(tolerance=tolerance), reason), *exact]
    if r is None:
        return exact
    sketch = Randomized(r=r)
    if r + sketch.oversampling <= SKETCH_SHARE * partition.k:
        return [(sketch, f"r = {r} with oversampling is at most a quarter of k = {partition.k}"), *exact]
    return [*exact, (sketch, f"r = {r} of k = {partition.k}")]


def _exact(partition: RowPartition, r: int | None, tolerance: float | None) -> list[tuple[Method, str]]:
    """Tsqr and Gather, the cheaper one first; with one process they are the same."""
    methods: list[Method] = [Tsqr(r=r, tolerance=tolerance)]
    if len(partition.rows) > 1:
        methods.append(Gather(r=r, tolerance=tolerance))
    methods.sort(key=lambda method: method.operations(partition))
    gflop = [f"{method.operations(partition) / 1e9:.3g}" for method in methods]
    what = f"all {partition.k} triplets"
    if len(methods) == 1:
        return [(methods[0], f"{what} on one process, {gflop[0]} GFlop")]
    names = [type(method).__name__ for method in methods]
    return [
        (methods[i], f"{what}, {gflop[i]} GFlop a process against {gflop[1 - i]} for {names[1 - i]}")
        for i in (0, 1)
    ]


def _run(method: Method, A: Tensor, comm: Communicator, vh: Columns, name: str) -> BlockSVD:
    match method:
        case Tsqr():
            return _cut(tsqr_svd(A, comm, vh=vh, name=name), method.r, method.tolerance)
        case Gather():
            return _cut(gathered_svd(A, comm, vh=vh, name=name), method.r, method.tolerance)
        case Hierarchical(r=r, tolerance=tolerance, shift=shift):
            return hierarchical_svd(A, comm, r=r, tolerance=tolerance, shift=shift, vh=vh, name=name)
        case Randomized(r=r, oversampling=extra, power_iterations=q, seed=seed):
            return randomized_svd(
                A, comm, r=r, oversampling=extra, power_iterations=q, seed=seed, vh=vh, name=name
            )


def _cut(svd: BlockSVD, r: int | None, tolerance: float | None) -> BlockSVD:
    """The leading triplets; ``s`` has the same bits everywhere, so all processes cut alike."""
    squares = svd.s.double().square()
    if tolerance is not None:
        r = fewest(svd.s, tolerance**2 * float(squares.sum()))
    if r is None or r >= len(svd.s):
        return svd
    U, s, Vh = svd.U[:, :r].contiguous(), svd.s[:r].clone(), svd.Vh[:r].clone()
    return BlockSVD(U, s, Vh, math.sqrt(float(squares[r:].sum())))


def _too_large(
    methods: list[Method], partition: RowPartition, dtype: torch.dtype, limit: float, name: str
) -> ConfigError:
    needs = ", ".join(
        f"{type(method).__name__} {forecast_bytes(method, partition, dtype) / GIB:.3g} GiB"
        for method in methods
    )
    size = f"{name} ({partition.m} x {partition.n}) on {len(partition.rows)} process(es)"
    return ConfigError(
        "memory_limit_bytes",
        int(limit),
        f"must be at least what a method needs for {size}: {needs}",
        fix="Use more processes, ask for fewer triplets (r), or raise the limit.",
    )
