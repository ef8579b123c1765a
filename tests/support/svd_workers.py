"""What a process of a gloo group or under mpirun does in the tests of the linear algebra.

As a script: ``mpirun -n 4 python svd_workers.py FOLDER 1 2 3 4`` writes ``FOLDER/RANK.pt``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from support.svd_cases import Case, block, few_cases

from hpc_oialr.errors import OIALRError
from hpc_oialr.linalg.basis_change import gram_products, orthogonality_error, stability_of
from hpc_oialr.linalg.communicator import Communicator, communicator
from hpc_oialr.linalg.distributed_svd import hierarchical_svd, randomized_svd
from hpc_oialr.linalg.row_partition import frobenius_norm
from hpc_oialr.linalg.tensors import Tucker, mlsvd
from hpc_oialr.linalg.tsqr import gathered_svd, tsqr_svd

Results = dict[str, tuple[Any, ...]]
METHODS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "tsqr": tsqr_svd,
    "gather": gathered_svd,
    "hierarchical": lambda A, comm: hierarchical_svd(A, comm, r=4, shift=3),
    "tolerance": lambda A, comm: hierarchical_svd(A, comm, tolerance=0.3),
    "randomized": lambda A, comm: randomized_svd(A, comm, r=4, oversampling=4),
    "columns": lambda A, comm: tsqr_svd(A, comm, vh="block"),
}


def over_gloo(rank: int, size: int, sizes: Sequence[int]) -> dict[int, dict[str, Any]]:
    """For ``spawn``: groups of the first 1, 2, ... processes, one after another."""
    dist.init_process_group("gloo", rank=rank, world_size=size)
    groups = {members: dist.new_group(list(range(members))) for members in sizes}
    return {s: everything(communicator(group), few_cases()) for s, group in groups.items() if rank < s}


def everything(comm: Communicator, matrices: Iterable[Case]) -> dict[str, Any]:
    """All methods on the matrices, figures from blocks, messages of errors."""
    results: Results = {}
    for name, A in matrices:
        mine = block(A, comm.rank, comm.size)
        for method, factorise in METHODS.items():
            results[f"{method} {name}"] = tuple(factorise(mine, comm))
    return {"svd": results, "figures": figures(comm), "errors": failures(comm), "tensors": tensors(comm)}


def figures(comm: Communicator) -> list[float]:
    """Of two random bases in blocks."""
    generator = torch.Generator().manual_seed(1)
    U1, U2, V1, V2 = (torch.linalg.qr(torch.randn(30, 6, dtype=torch.float64, generator=generator)).Q for _ in range(4))
    U, V, Q, W = (block(part, comm.rank, comm.size) for part in (U1, V1, U2, V2))
    return [
        stability_of(*gram_products(U, V.mT, Q, W.mT, comm)),
        orthogonality_error(3.0 * U, comm),
        frobenius_norm(2.0 * U, comm),
    ]


def tensors(comm: Communicator) -> list[Tucker]:
    """Multilinear SVDs of a tall, a wide and a short tensor in blocks of its first mode, some of them empty."""
    found = []
    for shape, r in (((7, 4, 5), (3, 2, 4)), ((2, 6, 3), None), ((30, 2, 3), (2, 1, 3))):
        T = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(found)))
        found.append(mlsvd(block(T, comm.rank, comm.size), r, group=comm))
    return found


def failures(comm: Communicator) -> list[str]:
    """What each process is told when process 0's (or the last one's) block is bad."""
    nan = torch.ones(4, 3)
    nan[1, 1] = float("nan") if comm.rank == comm.size - 1 else 1.0
    told = []
    for A in (nan, torch.ones(4, 3 + comm.rank % 2)):
        try:
            tsqr_svd(A, comm, name="fc1.weight")
            told.append("ok")
        except OIALRError as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def over_mpi(folder: Path, sizes: Sequence[int]) -> None:
    """The same under mpirun."""
    from mpi4py import MPI

    world, found = MPI.COMM_WORLD, {}
    for size in sizes:
        part = world.Split(0 if world.rank < size else MPI.UNDEFINED)
        if part != MPI.COMM_NULL:
            found[size] = everything(communicator(part), few_cases())
    torch.save(found, folder / f"{world.rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    over_mpi(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
