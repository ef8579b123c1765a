"""The same recipe under every engine, on 1, 2 and 4 processes: same r per layer, same losses.

`oialr train` under torchrun for 100 steps that hold the conversion and two cuts, with one global batch;
losses are compared step by step with those of one process, in bf16 the last evaluation's metric, beside
the spread of three seeds of one process. `--settings` are further settings of the recipe; the tables in
`results/` say which they were made with. Goes on where it was interrupted.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Row, arguments, earlier, finish
from benchmarks.kill_resume import start

STEPS = ["--train.steps", "100", "--oialr.delay", "30", "--oialr.frequency", "20", "--train.evaluations", "1",
         "--record.every", "1", "--oialr.importance", "weights"]  # fmt: skip
ENGINES: dict[str, list[str]] = {
    "ddp": ["--engine", "DDP"],
    "fsdp": ["--engine", "FSDP"],
    "tensor": ["--engine", "TensorParallel"],
    "zero1": ["--engine", "DeepSpeed", "--engine.stage", "1"],
    "zero2": ["--engine", "DeepSpeed", "--engine.stage", "2"],
    "zero3": ["--engine", "DeepSpeed", "--engine.stage", "3"],
}
# DeepSpeed has no float64; Muon cannot work on ZeRO's flat partitions: give these AdamW.
NO_FLOAT64 = ("zero1", "zero2", "zero3")


def train(processes: int, recipe: str, settings: Sequence[str], folder: Path) -> tuple[list[float], Row]:
    """Losses by step, and the summary."""
    if start(processes, "train", recipe, *STEPS, *settings, "--out", str(folder)).wait():
        raise SystemExit(f"the run on {processes} processes failed: {recipe} {' '.join(settings)}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "metric" not in row], json.loads((folder / "summary.json").read_text())


def compare(alone: tuple[list[float], Any], other: tuple[list[float], Any]) -> Row:
    """How far two runs are apart."""
    pairs = zip(other[0], alone[0], strict=True)
    return {
        "steps": len(other[0]),
        "same_r": other[1]["r"] == alone[1]["r"],
        "largest_relative_loss_difference": max(abs(a - b) / abs(b) for a, b in pairs),
        "metric": other[1]["metric"],
        "metric_of_one_process": alone[1]["metric"],
    }


def main() -> None:
    """Every engine, precision and number of processes against one process."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--recipe", default="fashion_mnist_vit")
    parser.add_argument("--engines", nargs="+", default=["ddp"], choices=list(ENGINES))
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--precisions", nargs="+", default=["float64", "fp32"])
    parser.add_argument("--settings", default="--data.limit 13000", help="further settings, as one word")
    options = parser.parse_args()
    rows = earlier(options.out)
    done = {(row["recipe"], row["engine"], row["precision"], row["processes"], row["settings"]) for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        for precision in options.precisions:
            common = [*options.settings.split(), "--train.precision", precision]
            alone: tuple[list[float], Any] | None = None
            for engine in options.engines:
                if precision == "float64" and engine in NO_FLOAT64:
                    continue
                for processes in options.processes:
                    key = (options.recipe, engine, precision, processes, options.settings)
                    if key in done:
                        continue
                    alone = alone or train(1, options.recipe, common, Path(scratch) / f"{precision}-1")
                    folder = Path(scratch) / f"{precision}-{engine}-{processes}"
                    found = train(processes, options.recipe, [*common, *ENGINES[engine]], folder)
                    names = ("recipe", "engine", "precision", "processes", "settings")
                    rows.append(dict(zip(names, key, strict=True)) | compare(alone, found))
                    finish(rows, options.out)
            if precision == "bf16" and alone is not None:
                rows.append(seeds(options.recipe, common, options.settings, Path(scratch)))
    finish(rows, options.out)


def seeds(recipe: str, common: Sequence[str], settings: str, scratch: Path) -> Row:
    """The metric of one process with three seeds: what difference means nothing in bf16."""
    metrics = [
        train(1, recipe, [*common, "--train.seed", str(seed)], scratch / f"seed-{seed}")[1]["metric"]
        for seed in range(3)
    ]
    return {
        "recipe": recipe,
        "engine": "three seeds",
        "precision": "bf16",
        "processes": 1,
        "settings": settings,
        "metrics": metrics,
    }


if __name__ == "__main__":
    main()
