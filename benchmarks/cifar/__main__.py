"""CIFAR-10 on one device: accuracy against training time, one row a run.

    python -m benchmarks.cifar --data FOLDER --out FILE --variants "dense Muon" "OIALR k/4"
    python -m benchmarks.cifar --data FOLDER --size small --epochs 5 10 20 --seeds 0 1 --out FILE
    python -m benchmarks.cifar --data FOLDER --validation --variants "warm:base=dense AdamW,lr=1e-3"

Runs that are in the file already are not run again; several calls may write to one file.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cifar.images import SIZES, load
from benchmarks.cifar.runs import Row, RowFile, run
from benchmarks.cifar.variants import parse, standard_variants
from hpc_oialr.errors import OIALRError

SHOWN = ("run", "seed", "epochs", "accuracy", "train_s", "cpu_s", "trained_share", "peak_memory_gib")


def main() -> None:
    """Run what is asked for and not in the file yet."""
    options = _options()
    try:
        variants = parse(options.variants) if options.variants else standard_variants()
        data = load(options.data, options.size, validation=options.validation, cache=options.cache)
    except OIALRError as error:
        sys.exit(f"error: {error}")
    variants = [replace(variant, batch=options.batch or variant.batch) for variant in variants]
    lengths = options.epochs or [None]
    variants = [replace(v, epochs=epochs or v.epochs) for epochs in lengths for v in variants]
    file = RowFile(options.out) if options.out is not None else None

    def keep(row: Row) -> None:
        if file is not None:
            file.add(row)
        shown = [f"{k} {row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in SHOWN if k in row]
        print(", ".join([*shown, *(str(row[key]) for key in ("left_out", "failed") if key in row)]), flush=True)

    deadline = None if options.budget is None else time.monotonic() + options.budget
    finished = file.rows() if file is not None and not options.again else []
    device = options.device
    run(variants, data, device, keep, deadline, seeds=options.seeds, evaluations=options.evaluations,
        finished=finished)  # fmt: skip


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = "; ".join(variant.name for variant in standard_variants())
    parser.add_argument(
        "--data", type=Path, required=True, metavar="FOLDER|TAR", help="images as files, or tar archives"
    )
    parser.add_argument("--size", choices=SIZES, default="full", help="default: %(default)s")
    parser.add_argument(
        "--variants",
        nargs="+",
        help=f'of: {known}; or "NAME:key=value,..." with base=STANDARD; or a JSON file. Default: all standard ones',
    )
    parser.add_argument("--epochs", type=float, nargs="+", help="each a run of its own; default: the size's")
    parser.add_argument("--batch", type=int, help="default: the size's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluations", type=int, default=10, help="of each run, evenly spaced")
    parser.add_argument("--validation", action="store_true", help="judge by held-out training images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, help="seconds; runs that would take longer are left out")
    parser.add_argument("--cache", type=Path, help="folder for the decoded images")
    parser.add_argument("--again", action="store_true", help="repeat runs that are in the file")
    parser.add_argument("--out", type=Path, help="result file (JSON)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
