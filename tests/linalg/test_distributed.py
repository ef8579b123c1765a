"""Every method on 1 to 8 threads, gloo processes and under mpirun, against LAPACK.

Threads do all matrices, processes a selection; gloo and MPI must give the same bits.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import svd_workers
from support.mpirun import mpirun, needs_mpirun
from support.spawn import spawn
from support.svd_cases import best_error, cases, errors, lapack_errors
from support.threads import run_threads

from hpc_oialr.linalg.row_partition import even_blocks

# Of processes the fewest that make a tree of two full levels, and one that is not full.
SIZES = {"threads": (1, 2, 3, 4, 8), "gloo": (1, 2, 3, 4), "mpi": (1, 2, 3)}
MATRICES = {case.name: case.A for case in cases()}
worlds = pytest.mark.parametrize(
    ("backend", "size"),
    [
        pytest.param(backend, size, marks=needs_mpirun if backend == "mpi" else pytest.mark.long if size > 4 else ())
        for backend, sizes in SIZES.items()
        for size in sizes
    ],
)


@cache
def run(backend: str, size: int) -> list[dict[str, Any]]:
    """What every process found."""
    if backend == "threads":
        return run_threads(size, lambda comm: svd_workers.everything(comm, cases()))
    return [found[size] for found in (gloo() if backend == "gloo" else mpi()) if size in found]


@cache
def gloo() -> list[dict[int, dict[str, Any]]]:
    """Processes are started once and form groups of all sizes."""
    return spawn(svd_workers.over_gloo, max(SIZES["gloo"]), SIZES["gloo"])


@cache
def mpi() -> list[dict[int, dict[str, Any]]]:
    """As many are started once."""
    with tempfile.TemporaryDirectory() as folder:
        most = max(SIZES["mpi"])
        done = mpirun(most, svd_workers.__file__, folder, *map(str, SIZES["mpi"]), timeout_s=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(most)]


def matrices(found: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Those the processes worked on."""
    done = {key.partition(" ")[2] for key in found[0]["svd"]}
    return {name: A for name, A in MATRICES.items() if name in done}


def whole(found: list[dict[str, Any]], key: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Rows of U joined; s, Vh and the error must be the same bits on every process."""
    parts = [process["svd"][key] for process in found]
    _, s, Vh, error = parts[0]
    for other in parts[1:]:
        assert torch.equal(other[1], s)
        assert torch.equal(other[2], Vh)
        assert other[3] == error
    return torch.cat([part[0] for part in parts]), s, Vh, error


@worlds
@pytest.mark.parametrize("method", ["tsqr", "gather"])
def test_exact_methods_are_as_good_as_lapack(backend: str, size: int, method: str) -> None:
    for name, A in matrices(run(backend, size)).items():
        U, s, Vh, error = whole(run(backend, size), f"{method} {name}")
        assert error == 0.0
        assert len(s) == min(A.shape)
        floor = torch.finfo(A.dtype).eps
        for ours, theirs in zip(errors(A, U, s, Vh), lapack_errors(A), strict=True):
            assert ours <= 10 * max(theirs, floor), (name, ours, theirs)


@worlds
def test_columns_of_vh_join_to_the_whole(backend: str, size: int) -> None:
    found = run(backend, size)
    for name, A in matrices(found).items():
        blocks = [process["svd"][f"columns {name}"][2] for process in found]
        assert [part.shape[1] for part in blocks] == even_blocks(A.shape[1], size)
        assert torch.equal(torch.cat(blocks, dim=1), whole(found, f"tsqr {name}")[2])


@worlds
@pytest.mark.parametrize("method", ["hierarchical", "randomized"])
def test_truncated_methods_are_near_the_optimum_and_know_their_error(backend: str, size: int, method: str) -> None:
    for name, A in matrices(run(backend, size)).items():
        U, s, Vh, error = whole(run(backend, size), f"{method} {name}")
        assert len(s) == 4
        eps, norm = torch.finfo(A.dtype).eps, float(torch.linalg.matrix_norm(A.double()))
        found = errors(A, U, s, Vh)
        true, best = found.residual * norm, best_error(A, 4)
        assert max(found.U, found.V) < 50 * eps, name
        # The randomized estimate is a difference of squares: good to the root of epsilon.
        slack = (40 * eps if method == "hierarchical" else 2 * eps**0.5) * norm
        assert abs(true - error) <= slack, (name, true, error)
        assert best * (1 - 40 * eps) - 40 * eps * norm <= true <= 1.25 * best + 40 * eps * norm, name
        if "falling" in name:
            assert found.s < 0.01, name


@worlds
def test_tolerance_is_kept_with_few_triplets(backend: str, size: int) -> None:
    for name, A in matrices(run(backend, size)).items():
        U, s, Vh, error = whole(run(backend, size), f"tolerance {name}")
        norm = float(torch.linalg.matrix_norm(A.double()))
        true = errors(A, U, s, Vh).residual * norm if len(s) else norm
        assert true <= 0.3 * norm * (1 + 1e-5), name
        assert abs(true - error) <= 100 * torch.finfo(A.dtype).eps * norm, name
        fewest = next(r for r in range(min(A.shape) + 1) if best_error(A, r) <= 0.3 * norm)
        assert fewest <= len(s) <= fewest + 3, (name, len(s), fewest)


@worlds
def test_figures_from_blocks(backend: str, size: int) -> None:
    alone = run("threads", 1)[0]["figures"]
    assert alone[1:] == pytest.approx([8.0, 2 * 6**0.5], rel=1e-12)
    for process in run(backend, size):
        assert process["figures"] == pytest.approx(alone, abs=1e-13)


@worlds
def test_multilinear_svd_of_blocks_is_that_of_the_whole_tensor(backend: str, size: int) -> None:
    for case, alone in enumerate(run("threads", 1)[0]["tensors"]):
        found = [process["tensors"][case] for process in run(backend, size)]
        for each in found:
            assert torch.equal(each.core, found[0].core)
            for s, expected in zip(each.spectra, alone.spectra, strict=True):
                torch.testing.assert_close(s, expected, rtol=0, atol=1e-13)
            for U, V in zip(each.bases, alone.bases, strict=True):
                torch.testing.assert_close(U @ U.mT, V @ V.mT, rtol=0, atol=1e-12)
            torch.testing.assert_close(each.dense(), alone.dense(), rtol=0, atol=1e-12)


@worlds
def test_every_process_tells_the_same_error(backend: str, size: int) -> None:
    for process in run(backend, size):
        nan, width = process["errors"]
        assert nan.startswith("NonFiniteError: fc1.weight holds 1 NaN or Inf among")
        assert f"(1 on rank {size - 1})" in nan
        expected = "ok" if size == 1 else "WorldError: the blocks of fc1.weight have widths 3 (rank 0), 4"
        assert width.startswith(expected)


@needs_mpirun
@pytest.mark.parametrize("size", SIZES["mpi"])
def test_gloo_and_mpi_give_the_same_bits(size: int) -> None:
    for gloo, mpi in zip(run("gloo", size), run("mpi", size), strict=True):
        assert gloo["figures"] == mpi["figures"]
        assert gloo["svd"].keys() == mpi["svd"].keys()
        for key, parts in gloo["svd"].items():
            for ours, theirs in zip(parts, mpi["svd"][key], strict=True):
                same = torch.equal(ours, theirs) if torch.is_tensor(ours) else ours == theirs
                assert same, key
