"""The same recipe on 1, 2 and 4 processes: same r per layer, same losses.

`oialr train fashion_mnist_vit` under torchrun for 100 steps that hold the conversion and two cuts, with
one global batch; losses are compared step by step with those of one process.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Row, arguments, finish
from benchmarks.kill_resume import start

SETTINGS = ["--train.steps", "100", "--oialr.delay", "30", "--oialr.frequency", "20", "--train.evaluations", "1",
            "--record.every", "1", "--data.limit", "13000"]  # fmt: skip


def train(processes: int, precision: str, folder: Path) -> tuple[list[float], dict[str, Any]]:
    """Losses by step, and the summary."""
    settings = [*SETTINGS, "--train.precision", precision, "--out", str(folder)]
    if start(processes, "train", "fashion_mnist_vit", *settings).wait():
        raise SystemExit(f"the run on {processes} processes failed; see {folder}/logs")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "metric" not in row]
    return losses, json.loads((folder / "summary.json").read_text())


def main() -> None:
    """float64 and fp32, 2 and 4 processes against 1."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--precisions", nargs="+", default=["float64", "fp32"])
    options = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for precision in options.precisions:
            alone, summary = train(1, precision, Path(scratch) / f"{precision}-1")
            for processes in (2, 4):
                losses, other = train(processes, precision, Path(scratch) / f"{precision}-{processes}")
                error = max(abs(a - b) / abs(b) for a, b in zip(losses, alone, strict=True))
                rows.append({
                    "processes": processes,
                    "precision": precision,
                    "steps": len(losses),
                    "same_r": other["r"] == summary["r"],
                    "largest_relative_loss_difference": error,
                })  # fmt: skip
    finish(rows, options.out)


if __name__ == "__main__":
    main()
