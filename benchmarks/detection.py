"""What is detected of one weak component in noise, against random-matrix theory; MLSVD and HOOI against TensorLy.

For each strength rho, tensors of noise of standard deviation 1 and one component of random unit vectors, in float64. A
row for each mode; all figures are means over seeds. `detected` is the share of tensors for which MultilinearNoiseEdge,
which does not know the noise's level, gives a core at all, `beyond_edge` that of modes with a value beyond the edge.
`eigenvalue` and `alignment` are MLSVD's, beside the predictions for large tensors and for this size; `alignment_error`
is the difference to the latter, `hooi_1` and so on are alignments after as many sweeps.

`speedup` is TensorLy's time over ours (one thread, medians, called in turn), each from the tensor on; `difference` the
largest entry of the difference of the bases' projections, after as many sweeps.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common import Row, arguments, finish, print_table, time_ratios
from hpc_oialr import MultilinearNoiseEdge, detection_threshold, hooi, mlsvd, predicted_alignment, predicted_eigenvalue
from hpc_oialr.linalg.noise_spectra import noise_level, unfolded_shapes
from hpc_oialr.linalg.tensors import Tucker
from hpc_oialr.report.plots import BLACK, VERMILION, in_style, new_figure, save, with_grid

SWEEPS = (1, 2, 3)
ONE = (1, 1, 1)
# TensorLy's backends. Its symeig_svd would form 48,000 x 48,000 matrices here, its randomized_svd is not exact.
BACKENDS = ("numpy", "pytorch")


def planted(shape: tuple[int, ...], rho: float, seed: int) -> tuple[Tensor, list[Tensor]]:
    """A tensor of noise and one component, and the component's vectors."""
    generator = torch.Generator().manual_seed(seed)
    T = torch.randn(shape, generator=generator, dtype=torch.float64)
    vectors = [torch.nn.functional.normalize(torch.randn(n, generator=generator).double(), dim=0) for n in shape]
    s = rho**0.5 * detection_threshold(shape, noise=1.0)
    return T.add_(torch.einsum("i,j,k->ijk", *vectors), alpha=s), vectors


def alignments(found: Tucker, vectors: list[Tensor]) -> list[float]:
    """Squared inner product of each basis's one vector with the component's."""
    return [float((U[:, 0] @ v) ** 2) for U, v in zip(found.bases, vectors, strict=True)]


def observe(shape: tuple[int, ...], rho: float, seed: int) -> dict[str, Any]:
    """One tensor's figures, of each mode."""
    T, vectors = planted(shape, rho, seed)
    found = mlsvd(T, ONE)
    rule, noise = MultilinearNoiseEdge(), noise_level(found.spectra, shape)
    modes = list(zip(found.spectra, unfolded_shapes(shape), strict=True))
    after = [alignments(hooi(T, ONE, start=found, sweeps=n, tolerance=0), vectors) for n in SWEEPS]
    return {
        "detected": min(rule.choose(found.spectra, shape)),
        "beyond_edge": [float(s[0] > rule.edge(m, n, noise)) for s, (m, n) in modes],
        "eigenvalue": [(float(s[0]) ** 2 / n - 1) / (m / n) ** 0.5 for s, (m, n) in modes],
        "alignment": alignments(found, vectors),
        **{f"hooi_{n}": values for n, values in zip(SWEEPS, after, strict=True)},
        "sweeps_to_converge": hooi(T, ONE, start=found).sweeps,
    }


def summary(shape: tuple[int, ...], rho: float, seeds: int) -> list[Row]:
    """A row for each mode."""
    # Other noise for each strength.
    seen = [observe(shape, rho, round(1000 * rho) + seed) for seed in range(seeds)]
    rows = []
    for mode, (m, n) in enumerate(unfolded_shapes(shape)):
        aligned = [each["alignment"][mode] for each in seen]
        rows.append(
            {
                "rho": rho,
                "mode": mode,
                "detected": statistics.mean(each["detected"] for each in seen),
                "beyond_edge": statistics.mean(each["beyond_edge"][mode] for each in seen),
                "eigenvalue": statistics.mean(each["eigenvalue"][mode] for each in seen),
                "predicted_large": predicted_eigenvalue(rho),
                "predicted": predicted_eigenvalue(rho, m / n),
                "alignment": statistics.mean(aligned),
                "standard_error": statistics.stdev(aligned) / seeds**0.5,
                "alignment_large": predicted_alignment(rho),
                "alignment_predicted": predicted_alignment(rho, m / n),
                "alignment_error": statistics.mean(aligned) - predicted_alignment(rho, m / n),
                **{f"hooi_{k}": statistics.mean(each[f"hooi_{k}"][mode] for each in seen) for k in SWEEPS},
                "sweeps_to_converge": statistics.median(each["sweeps_to_converge"] for each in seen),
            }
        )
    return rows


def against_tensorly(shape: tuple[int, ...], r: tuple[int, ...], repeats: int) -> list[Row]:
    """Differences and times of MLSVD (no sweep) and HOOI."""
    import tensorly
    from tensorly.decomposition import tucker

    T, _vectors = planted(shape, 3.0, seed=0)

    def theirs(sweeps: int, backend: str) -> list[Tensor]:
        with tensorly.backend_context(backend):
            _core, factors = tucker(tensorly.tensor(T), rank=list(r), n_iter_max=sweeps, tol=0)
        return [torch.as_tensor(U) for U in factors]

    rows = []
    for sweeps in (0, 2):
        calls: dict[str, Callable[[], Any]] = {
            "ours": lambda n=sweeps: hooi(T, r, sweeps=n, tolerance=0) if n else mlsvd(T, r),
            **{backend: lambda n=sweeps, backend=backend: theirs(n, backend) for backend in BACKENDS},
        }
        # Also warms up.
        found = {name: call() for name, call in calls.items()}
        ratios, seconds = time_ratios(calls, "ours", repeats=repeats, warmup=0)
        for backend in BACKENDS:
            pairs = zip(found["ours"].bases, found[backend], strict=True)
            difference = max(float((U @ U.mT - V @ V.mT).abs().max()) for U, V in pairs)
            size = {"shape": list(shape), "r": list(r), "sweeps": sweeps, "tensorly": backend}
            rows.append({**size, "seconds": seconds, "speedup": ratios[backend], "difference": difference})
    return rows


@in_style
def draw(rows: list[Row], shape: tuple[int, ...]) -> Figure:
    """Alignments and eigenvalues over the strength, means over modes, beside the predictions."""
    figure, (left, right) = new_figure("double", height=0.8, ncols=2)
    strengths = sorted({row["rho"] for row in rows})
    sides = [m / n for m, n in unfolded_shapes(shape)]
    fine = torch.linspace(min(strengths), max(strengths), 400).tolist()

    def means(key: str) -> list[float]:
        return [statistics.mean(row[key] for row in rows if row["rho"] == rho) for rho in strengths]

    for axes, predict, key in ((left, predicted_alignment, "alignment"), (right, predicted_eigenvalue, "eigenvalue")):
        at_size = [statistics.mean(predict(rho, c) for c in sides) for rho in fine]
        axes.plot(fine, [predict(rho) for rho in fine], ":", color=BLACK, label="theory, large tensors")
        axes.plot(fine, at_size, "-", color=BLACK, label="theory, this size")
        axes.plot(strengths, means(key), "o", color=BLACK, label="MLSVD")
        with_grid(axes).set_xlabel(r"strength $\rho$")
    left.plot(strengths, means("hooi_1"), "^", color=VERMILION, label="HOOI, 1 sweep")
    left.plot(strengths, means("hooi_3"), "v", color=VERMILION, markerfacecolor="none", label="HOOI, 3 sweeps")
    left.set_ylabel("squared alignment")
    right.set_ylabel(r"eigenvalue $\xi$")
    left.legend(loc="lower right")
    right.legend(loc="upper left")
    return figure


def main() -> None:
    """Run the simulation, then the comparison."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shape", type=int, nargs=3, default=(160, 200, 240))
    parser.add_argument("--rho", type=float, nargs="+", default=(0.5, 0.8, 1.2, 1.5, 2.0, 3.0, 5.0))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2, help="rounds of the timing")
    options = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: TensorLy computes by NumPy, which reads it, and must have as many threads")
    shape = tuple(options.shape)
    rows = [row for rho in options.rho for row in summary(shape, rho, options.seeds)]
    timing = against_tensorly(shape, (8, 8, 8), options.repeats)
    print_table(timing)
    finish(rows, options.out, timing=timing, shape=list(shape), seeds=options.seeds)
    if options.out:
        print(save(draw(rows, shape), options.out.with_suffix(".png")))


if __name__ == "__main__":
    main()
