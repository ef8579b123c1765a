"""Distributed SVD: every method on 1, 2 and 4 processes of one thread each, over gloo.

`speedup` is against torch.linalg.svd on one process with one thread, `scaling` against the same method on
one process, both timed in turn with it in one run. `error` is ||A - U diag(s) Vh||_F / ||A||_F; for r = 32 most
of it is what 32 triplets cannot hold. `bytes_sent` is of the process that sends most.

Rows `update` time the SVDs of ViT-B/16, distributed by cost: of its cores at r = k/4, as in every update, and
of its dense weights, as in the one conversion. `share_times_p` is P times their time over one process's: 1 is
perfect.

Figures of the square matrix and of the dense weights are from few rounds, so that all ends within a quarter of an
hour on two cores. More processes than cores measure the overhead, not the speed.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch.multiprocessing as mp

from benchmarks.common import Row, arguments, finish
from benchmarks.processes import free_port
from benchmarks.svd_workers import work

Jobs = list[tuple[str, dict[str, Any]]]
TALL_METHODS = ("tsqr", "hierarchical r=32", "randomized r=32")
SQUARE_METHODS = ("tsqr", "gather", "randomized r=32")
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def vit_layers(dim: int, depth: int) -> list[tuple[int, int]]:
    """Shapes of a vision transformer's weights: query, key, value, output, and the two of the MLP."""
    return [(dim, dim)] * (4 * depth) + [(4 * dim, dim), (dim, 4 * dim)] * depth


def spawn(size: int, jobs: Jobs) -> list[Row]:
    """Run the jobs on ``size`` fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        mp.spawn(work, args=(size, free_port(), str(out), jobs), nprocs=size)
        rows: list[Row] = json.loads(out.read_text())
    return rows


def main() -> None:
    """Run the grid."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--tall", type=int, nargs=2, default=(65536, 512), metavar=("M", "N"))
    parser.add_argument("--square", type=int, default=4096, metavar="N", help="0 leaves it out")
    parser.add_argument("--processes", type=int, nargs="+", default=(1, 2, 4))
    parser.add_argument("--repeats", type=int, default=2, help="rounds, after one that is dropped")
    parser.add_argument("--dim", type=int, default=768, help="width of the vision transformer; 0 leaves it out")
    parser.add_argument("--depth", type=int, default=12)
    options = parser.parse_args()
    for name in ONE_THREAD:
        os.environ[name] = "1"
    (m, n), square, repeats = options.tall, options.square, options.repeats
    rows: list[Row] = []
    for size in options.processes:
        tall = {"m": m, "n": n, "methods": TALL_METHODS, "others": True, "repeats": repeats, "dropped": 1}
        jobs: Jobs = [("matrix", tall)]
        if square:
            sizes = {"m": square, "n": square, "methods": SQUARE_METHODS, "others": False}
            jobs.append(("matrix", {**sizes, "repeats": 1, "dropped": 0}))
        if options.dim and size > 1:
            dense = vit_layers(options.dim, options.depth)
            cores = [(min(shape) // 4,) * 2 for shape in dense]
            jobs.append(("update", {"kind": "cores", "layers": cores, "repeats": 3 * repeats, "dropped": 1}))
            jobs.append(("update", {"kind": "dense", "layers": dense, "repeats": repeats, "dropped": 0}))
        rows += spawn(size, jobs)
    extra = ("share_times_p", "balance")
    finish([{**row, **{key: row.get(key) for key in extra}} for row in rows], options.out)


if __name__ == "__main__":
    main()
