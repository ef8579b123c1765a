"""Accuracy against training time at several budgets, each point a run with a schedule of its own.

    python -m benchmarks.cifar.plot benchmarks/results/cifar_small.json

Writes a picture beside the file. A line joins the medians over seeds of the runs of one name; points are single runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from hpc_oialr.report.plots import BLACK, GREY, VERMILION, in_style, new_figure, save, with_grid

LOW_RANK = (VERMILION, "#0072B2", "#009E73", "#CC79A7")
DENSE = (BLACK, GREY)


@in_style
def draw(path: Path) -> Path:
    """Draw the rows of a result file of ``benchmarks.cifar``."""
    content = json.loads(path.read_text())
    rows = [row for row in content["rows"] if "failed" not in row]
    figure, axes = new_figure("double", height=0.9)
    dense, low_rank = iter(DENSE), iter(LOW_RANK)
    for name in dict.fromkeys(row["run"] for row in rows):
        mine = [row for row in rows if row["run"] == name]
        colour = next(dense if name.startswith("dense") else low_rank)
        lengths: dict[float, list[tuple[float, float]]] = defaultdict(list)
        for row in mine:
            lengths[row["epochs"]].append((row["cpu_s"], 100 * row["accuracy"]))
        middle = [tuple(map(statistics.median, zip(*lengths[key], strict=True))) for key in sorted(lengths)]
        axes.plot(*zip(*middle, strict=True), color=colour, label=name)
        axes.plot(*zip(*(point for each in lengths.values() for point in each), strict=True), "o", color=colour, ms=4)
        # Labels of the two sides keep apart where the lines meet.
        place, side = ((5, -9), "left") if name.startswith("dense") else ((-5, 5), "right")
        for point, epochs in zip(middle, sorted(lengths), strict=True):
            label = f"{epochs:g} epochs"
            axes.annotate(label, point, xytext=place, textcoords="offset points", fontsize=6, ha=side)
    axes.set_xlabel("processor time of training (s)")
    axes.set_ylabel(f"{rows[0]['judged_on']} accuracy (%)")
    axes.margins(x=0.1, y=0.1)
    axes.legend(loc="lower right")
    with_grid(axes)
    return save(figure, path.with_suffix(".png"), inputs=[path])


def main() -> None:
    """Draw one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    print(draw(parser.parse_args().file))


if __name__ == "__main__":
    main()
