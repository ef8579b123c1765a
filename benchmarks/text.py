"""GPT-2 on bytes: loss against tokens and training time, dense and low rank, `oialr train text_gpt` with each setting.

    python -m benchmarks.text --out benchmarks/results/text.json
    python -m benchmarks.text --out FILE --seeds 0 1 --budget 500 --set train.precision bf16

Runs follow one another in one process, so that nothing runs beside them. The dense side's rate is chosen by the
validation loss of the first seed; more seeds run that one and the low-rank sides, the best first. Losses are nats a
byte. Rows that are in the file already are not run again.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import Row, arguments, earlier, finish, print_table
from hpc_oialr.cli.main import main as oialr

RATES = (0.01, 0.005, 0.02)
DENSE = {f"dense, rate {rate:g}": ["--dense", "--optimizer.lr", f"{rate:g}"] for rate in RATES}
LATER = ["--oialr.delay", "0.3", "--oialr.frequency", "0.066"]
LAST = [*LATER, "--oialr.bases_trained", "[[0.7,null]]", "--optimizer.bases_lr", "0.01"]
LOW_RANK = {
    "k/4, bases trained from 70 % on": LAST,
    "k/4, cores": LATER,
    "k/4, cores, the recipe": [],
    "5k/12, cores": [*LATER, "--oialr.rule.fraction", "0.4167"],
    "k/4, bases trained from 30 % on": [
        *LATER,
        "--oialr.bases_trained",
        "[[0.3,null]]",
        "--optimizer.bases_lr",
        "0.01",
    ],
    "k/2, cores from 60 % on": ["--oialr.delay", "0.6", "--oialr.frequency", "0.1", "--oialr.rule.fraction", "0.5"],
    "k/2, bases trained from 70 % on": [*LAST, "--oialr.rule.fraction", "0.5"],
}
SHOWN = (
    *("run", "seed", "steps", "validation_loss", "test_loss"),
    *("train_s", "update_s", "trained_share", "peak_memory_gib", "cuda_graph"),
)


def run(name: str, settings: Sequence[str], seed: int) -> Row:
    """One training, from its run folder."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        words = ["train", "text_gpt", *settings, "--train.seed", str(seed), "--checkpoint.every", "null"]
        if status := oialr([*words, "--out", str(folder)]):
            raise SystemExit(f"{' '.join(words)} ended with {status}")
        result = json.loads((folder / "summary.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    judged = [line for line in lines if line.get("split") == "validation"]
    (test,) = (line for line in lines if line.get("split") == "test")
    return {
        "run": name,
        "seed": seed,
        "steps": result["steps"],
        "validation_loss": judged[-1]["loss"],
        "test_loss": test["loss"],
        "train_s": result["wall_s"],
        "update_s": result["update_wall_s"],
        "tokens_per_s": result["tokens_per_s"],
        "trained_share": result["trainable_params"] / result["dense_trainable_params"],
        "peak_memory_gib": result["peak_memory_gib"],
        "cuda_graph": result["cuda_graph"],
        "curve": [[line["step"], round(line["wall_s"], 2), line["loss"]] for line in judged],
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "settings": " ".join(settings),
    }


def best_first(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """Those of ``names`` with rows of the first seed, by validation loss."""
    losses = {row["run"]: row["validation_loss"] for row in rows if row["run"] in names}
    return sorted(losses, key=losses.__getitem__)


def main() -> None:
    """Run what is not in the file yet."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--runs", nargs="+", choices=[*DENSE, *LOW_RANK], help="default: all")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds after which no run is begun")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="of every run")
    options = parser.parse_args()
    common = [word for name, value in options.set for word in (f"--{name}", value)]
    sides = {**DENSE, **LOW_RANK}
    order = ["dense, rate 0.01", *LOW_RANK, *(name for name in DENSE if name != "dense, rate 0.01")]
    rows = earlier(options.out)
    begin = time.monotonic()
    for i, seed in enumerate(options.seeds):
        names = options.runs or order
        if i and not options.runs:
            first = [row for row in rows if row["seed"] == options.seeds[0]]
            names = [*best_first(first, list(DENSE))[:1], *best_first(first, list(LOW_RANK))]
        for name in names:
            settings = [*sides[name], *common]
            known = {(row["run"], row["seed"], row["settings"]) for row in rows}
            late = options.budget is not None and time.monotonic() - begin > options.budget
            if late or (name, seed, " ".join(settings)) in known:
                continue
            rows.append(run(name, settings, seed))
            finish(rows, options.out)
    print_table([{key: row[key] for key in SHOWN} for row in rows])


if __name__ == "__main__":
    main()
