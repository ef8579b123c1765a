"""Command line; the package's docstring says how to use it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import benchmarks.gpu
from benchmarks.gpu.results import Results, load
from benchmarks.gpu.runner import Context, Plan, run
from benchmarks.gpu.sections import PLANS
from benchmarks.gpu.table import lines

FOLDER = Path(__file__).resolve().parents[1] / "results"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table; or print the table of a file."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        if options.table is not None:
            print("\n".join(lines(load(options.table))))
            return
        measure(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def measure(options: argparse.Namespace) -> None:
    """Run the chosen sections within the budget."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    card = torch.cuda.get_device_name(device) if cuda else "CPU"
    tiny = options.tiny or not cuda
    out = options.out
    if out is None and not tiny:
        out = FOLDER / f"gpu_{re.sub('[^a-z0-9]+', '_', card.lower())}.json"
    plans = chosen(options.only)
    if not 0 <= options.budget < float("inf"):
        raise ValueError(f"--budget is {options.budget}; must be a number of seconds, 0 or more.")
    if options.data is not None and not options.data.exists():
        raise ValueError(f"--data {options.data} does not exist; give the folder or archive of CIFAR-10 images.")
    results = Results(out, card, tiny=tiny)
    torch.manual_seed(0)
    run(plans, Context(device, tiny, options.data), results, options.budget)
    print("\n".join(lines(results.content)))
    if out is not None:
        print(out)


def chosen(only: str | None) -> Sequence[Plan]:
    """The named sections, in their own order.

    Raises
    ------
    ValueError
        For a name that is none.
    """
    if only is None:
        return PLANS
    known, wanted = [plan.name for plan in PLANS], [name.strip() for name in only.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"--only {unknown[0]} is no section; there are {', '.join(known)}.")
    return [plan for plan in PLANS if plan.name in wanted]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="result file (JSON), rewritten after each row")
    parser.add_argument("--budget", type=float, default=450, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--only", metavar="SECTION,...", help=", ".join(plan.name for plan in PLANS))
    parser.add_argument("--data", type=Path, metavar="FOLDER|TAR", help="CIFAR-10 images, for accuracy")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes, as always without a GPU")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the table of a result file, measure nothing")
    return parser


if __name__ == "__main__":
    main()
