"""OIALR at k/4 with U and Vh trained never, always, at the end or in the middle of the run, or growing at updates.

    python -m benchmarks.bases_trained --data FOLDER --out benchmarks/results/bases_trained.json
    python -m benchmarks.bases_trained --data FOLDER --size full --device cuda --seeds 0 1 2 --out FILE

What frozen bases cost. CIFAR-10 by `benchmarks.cifar`, all runs converted at 30 % and cut to k/4 at 50 % of the run (at
55 %, new directions included, where bases grow), Muon .005 for dense matrices and bases, .01 for cores; judged by
training images that no run trains on. Runs in the file already are not run again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cifar.images import SIZES, load
from benchmarks.cifar.runs import Row, RowFile, run
from benchmarks.cifar.variants import Variant, parse
from benchmarks.common import print_table

SHOWN = ("run", "seed", "epochs", "accuracy", "train_s", "cpu_s", "trained_share", "peak_memory_gib")


def variants() -> list[Variant]:
    """The dense run, and every schedule."""
    dense, cores = parse(["dense Muon", "OIALR k/4, later"])
    # New directions take some 20 steps to find their way, and an update at the end drops what they have learned.
    growing = replace(cores, until=0.55, cuts=2)
    return [
        replace(cores, name="cores"),
        replace(cores, name="factors", free_from=0.0),
        replace(cores, name="factors at the end", free_from=0.7),
        replace(cores, name="factors in the middle", free_from=0.3, free_until=0.6),
        replace(growing, name="growing by 1/8", grow=1 / 8, fraction=0.21),
        replace(growing, name="growing by 1/16", grow=1 / 16, fraction=0.225),
        replace(growing, name="growing by 1/8, inputs", grow=1 / 8, fraction=0.21, importance="inputs"),
        dense,
    ]


def main() -> None:
    """Run what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER|TAR", help="as for benchmarks.cifar")
    parser.add_argument("--size", choices=SIZES, default="small", help="default: %(default)s")
    parser.add_argument("--epochs", type=float, help="default: the size's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", metavar="RUN", choices=[v.name for v in variants()], help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, required=True, help="result file (JSON)")
    options = parser.parse_args()
    data, file = load(options.data, options.size, validation=True), RowFile(options.out)

    def keep(row: Row) -> None:
        file.add(row)
        print(", ".join(f"{key} {row[key]}" for key in SHOWN if key in row), flush=True)

    chosen = [variant for variant in variants() if variant.name in (options.only or [variant.name])]
    wanted = [replace(variant, epochs=options.epochs) for variant in chosen]
    run(wanted, data, options.device, keep, seeds=options.seeds, finished=file.rows())
    print_table([{key: row[key] for key in SHOWN} for row in file.rows()])


if __name__ == "__main__":
    main()
