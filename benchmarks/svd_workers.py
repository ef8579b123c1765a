"""One process's part of `benchmarks.svd`: build its rows, run every method, time it."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.common import Row
from hpc_oialr.linalg.communicator import Communicator, communicator
from hpc_oialr.linalg.distributed_svd import gaussian, hierarchical_svd, randomized_svd
from hpc_oialr.linalg.row_partition import block_of, frobenius_norm
from hpc_oialr.linalg.svd import svd
from hpc_oialr.linalg.tsqr import gathered_svd, tsqr_svd
from hpc_oialr.linalg.work_plan import longest_processing_time, svd_cost

REFERENCE = "torch.linalg.svd"
R = 32
DECAY = 0.99
BLOCK = 256
Method = Callable[..., Sequence[Any]]
METHODS: dict[str, Method] = {
    "tsqr": tsqr_svd,
    "gather": gathered_svd,
    "hierarchical r=32": partial(hierarchical_svd, r=R),
    "randomized r=32": partial(randomized_svd, r=R),
}


def work(rank: int, size: int, port: int, out: str, jobs: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Join a gloo group with one thread, run the jobs, write process 0's rows to ``out``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
    comm = communicator(dist.group.WORLD)
    rows = [row for kind, settings in jobs for row in {"matrix": matrix, "update": update}[kind](comm, **settings)]
    if rank == 0:
        Path(out).write_text(json.dumps(rows))
    comm.all_reduce(torch.zeros(1))
    time.sleep(0.5)
    # Ending the interpreter under gloo's threads now and then aborts the process.
    os._exit(0)


def timed_together(comm: Communicator, function: Callable[[], object], members: int) -> float:
    """Seconds until the last of the first ``members`` processes is done; the others wait."""
    comm.all_reduce(torch.zeros(1))
    start = time.perf_counter()
    if comm.rank < members:
        function()
    mine = torch.tensor(time.perf_counter() - start if comm.rank < members else 0.0, dtype=torch.float64)
    return float(comm.all_reduce(mine, op="max"))


def rounds(
    comm: Communicator, functions: Mapping[str, tuple[Callable[[], object], int]], repeats: int, dropped: int
) -> list[dict[str, float]]:
    """All functions in turn, again and again, so that drifts of the machine's speed meet all; first rounds dropped."""
    return [
        {name: timed_together(comm, function, members) for name, (function, members) in functions.items()}
        for _ in range(repeats + dropped)
    ][dropped:]


def median_ratio(times: list[dict[str, float]], above: str, below: str) -> float:
    """Median over rounds."""
    return statistics.median(t[above] / t[below] for t in times)


def matrix(
    comm: Communicator, *, m: int, n: int, methods: Sequence[str], others: bool, repeats: int, dropped: int
) -> list[Row]:
    """Each method on this group, the same method on process 0 alone, and the reference there."""
    A = test_rows(slice(0, m), n) if comm.rank == 0 else torch.empty(0, n)
    mine = test_rows(block_of(m, comm.size, comm.rank), n)
    functions: dict[str, tuple[Callable[[], object], int]] = {
        REFERENCE: (partial(torch.linalg.svd, A, full_matrices=False), 1)
    }
    for name in methods:
        functions[name] = (partial(METHODS[name], mine, comm), comm.size)
        if comm.size > 1:
            functions[f"{name}, alone"] = (partial(METHODS[name], A, None), 1)
    foreign = other_packages(A, comm.size) if others else {}
    functions |= {name: (function, 1) for name, function in foreign.items()}
    times = rounds(comm, functions, repeats, dropped)
    shown = [name for name in functions if not name.endswith("alone")]
    return [_row(name, comm, times, mine, A, m, n, foreign) for name in shown]


def test_rows(rows: slice, n: int) -> Tensor:
    """Gaussian columns that shrink by 1 % from one to the next: a spectrum that falls slowly."""
    scale = DECAY ** torch.arange(n)
    # Blocks with a seed each: a process draws what it needs, and no more than a block beside it.
    first, last = rows.start // BLOCK, -(-rows.stop // BLOCK)
    blocks = [gaussian(BLOCK, n, seed=block) for block in range(first, last)] or [torch.empty(0, n)]
    return torch.cat(blocks)[rows.start - first * BLOCK : rows.stop - first * BLOCK] * scale


def _row(
    name: str,
    comm: Communicator,
    times: list[dict[str, float]],
    mine: Tensor,
    A: Tensor,
    m: int,
    n: int,
    foreign: Mapping[str, Callable[[], Any]],
) -> Row:
    row = {"method": name, "m": m, "n": n, "dtype": "float32"}
    row["processes"] = 1 if name == REFERENCE or name.startswith("scikit") else comm.size
    row["seconds"] = statistics.median(t[name] for t in times)
    row["speedup"] = median_ratio(times, REFERENCE, name)
    row["scaling"] = median_ratio(times, f"{name}, alone", name) if f"{name}, alone" in times[0] else 1.0
    before = comm.bytes_sent
    if name in METHODS:
        U, s, Vh, *_ = METHODS[name](mine, comm)
        sent = torch.tensor(comm.bytes_sent - before)
        row["error"] = frobenius_norm(mine - (U * s) @ Vh, comm) / frobenius_norm(mine, comm)
        row["bytes_sent"] = int(comm.all_reduce(sent, op="max"))
    elif comm.rank == 0:
        lapack = partial(torch.linalg.svd, A, full_matrices=False)
        U, s, Vh = (torch.as_tensor(part) for part in foreign.get(name, lapack)())
        row["error"] = float(torch.linalg.norm(A - (U * s) @ Vh) / torch.linalg.norm(A))
        row["bytes_sent"] = 0
    return row


def other_packages(A: Tensor, workers: int) -> dict[str, Callable[[], Any]]:
    """scikit-learn's and dask's methods, where they are installed; one BLAS thread each."""
    found: dict[str, Callable[[], Any]] = {}
    array = A.numpy()
    if workers == 1:
        try:
            from sklearn.utils.extmath import randomized_svd as theirs

            found["scikit-learn randomized_svd r=32"] = partial(theirs, array, R, n_iter=2, random_state=0)
        except ImportError:
            pass
    try:
        import dask
        import dask.array as da
    except ImportError:
        return found
    blocks = da.from_array(array, chunks=(max(1, -(-len(array) // 8)), array.shape[1]))
    run = partial(dask.compute, scheduler="threads", num_workers=workers)
    found["dask tsqr"] = lambda: run(*da.linalg.svd(blocks))
    found["dask svd_compressed r=32"] = lambda: run(*da.linalg.svd_compressed(blocks, R, n_power_iter=2, seed=0))
    return found


def update(comm: Communicator, *, kind: str, layers: list[tuple[int, int]], repeats: int, dropped: int) -> list[Row]:
    """The SVDs of one update, distributed by cost, against all of them on process 0; each result is freed."""
    matrices = [gaussian(m, n, seed=i) for i, (m, n) in enumerate(layers)]
    costs = [svd_cost(m, n) for m, n in layers]
    owners = longest_processing_time(costs, comm.size)

    def run(rank: int | None) -> None:
        for owner, A in zip(owners, matrices, strict=True):
            if rank in (None, owner):
                svd(A)

    functions = {"alone": (partial(run, None), 1), "dealt": (partial(run, comm.rank), comm.size)}
    times = rounds(comm, functions, repeats, dropped)
    loads = [sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == p) for p in range(comm.size)]
    share = median_ratio(times, "dealt", "alone")
    return [
        {
            "method": f"update {kind} ({len(layers)} SVDs)",
            "m": max(m for m, _ in layers),
            "n": max(n for _, n in layers),
            "dtype": "float32",
            "processes": comm.size,
            "seconds": statistics.median(t["dealt"] for t in times),
            "speedup": 1 / share,
            "scaling": 1 / share,
            "error": None,
            "bytes_sent": None,
            "share_times_p": share * comm.size,
            "balance": max(loads) * comm.size / sum(loads),
        }
    ]
