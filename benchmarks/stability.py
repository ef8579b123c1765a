"""How far the bases of every layer settle in dense training: the first figure of arXiv 2401.08505, on our models.

Each run is `oialr train RECIPE --oialr null --record.spectra true` with the overrides below: a ViT, a conv net
and a GPT, trained dense by AdamW as in the paper, with a cosine schedule (the figure) and with a constant
learning rate, which tells apart what settles by itself and what the schedule's decay brings to rest. The GPT is
trained by Muon too, its recipe's own optimizer. Runs have one thread each, two at a time; all take about eight
minutes on two cores. Stability does not depend on the machine's speed.

`python -m benchmarks.stability --out benchmarks/results/stability.json` writes `stability_vit.json`, `.png` and
so on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Row, arguments, finish
from hpc_oialr.report.layers import settling_steps
from hpc_oialr.report.plots.stability import stability
from hpc_oialr.report.plots.style import save
from hpc_oialr.spectra import Spectra
from hpc_oialr.spectra import open as open_spectra

STEPS, FREQUENCY = 400, 20
THRESHOLDS = (0.9, 0.95, 0.99)
COMMON = ["--oialr", "null", "--record.spectra", "true", "--record.frequency", str(FREQUENCY),
          "--train.steps", str(STEPS), "--train.evaluations", "1", "--checkpoint.every", "null"]  # fmt: skip
# Smaller batches than the recipes', and a smaller GPT on shorter texts, so that all fits into minutes.
MODELS: dict[str, tuple[str, list[str]]] = {
    "vit": ("fashion_mnist_vit", ["--train.global_batch", "32"]),
    "convnet": ("fashion_mnist_convnet", ["--train.global_batch", "16"]),
    "gpt": ("text_gpt", ["--model.dim", "128", "--model.depth", "4", "--model.heads", "4",
                         "--data.sequence_length", "128", "--train.global_batch", "8"]),
}  # fmt: skip
ADAMW = ["--optimizer", "AdamW", "--optimizer.lr", "5e-4"]
VARIANTS: dict[str, list[str]] = {
    "cosine": ADAMW,
    "constant": [*ADAMW, "--schedule", "Constant"],
    "muon": [],
}
RUNS = [*((model, variant) for variant in ("cosine", "constant") for model in MODELS), ("gpt", "muon")]


def main() -> None:
    """Train, summarise, draw."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--runs", type=Path, help="where runs are kept; finished ones are not trained again")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.runs or Path(scratch)
        with ThreadPoolExecutor(max_workers=options.jobs) as pool:
            list(pool.map(lambda run: train(*run, folder), RUNS))
        for model in MODELS:
            summarise(model, folder, options.out)


def train(model: str, variant: str, folder: Path) -> None:
    """One run, unless it is there."""
    out = folder / f"{model}_{variant}"
    if (out / "summary.json").exists():
        return
    recipe, reduced = MODELS[model]
    command = ["train", recipe, *COMMON, *reduced, *VARIANTS[variant], "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "hpc_oialr", *command], check=True, env=environment, stdout=subprocess.DEVNULL
    )


def summarise(model: str, folder: Path, out: Path | None) -> None:
    """One model's table and figure: for ``stability.json`` ``stability_MODEL.json`` and ``.png``."""
    target = None if out is None else out.with_name(f"{out.stem}_{model}.json")
    rows: list[Row] = []
    for variant in (variant for of, variant in RUNS if of == model):
        with open_spectra(folder / f"{model}_{variant}") as run:
            rows += [{"run": variant, **row} for row in layer_rows(run)]
            if target is not None and variant == "cosine":
                target.parent.mkdir(parents=True, exist_ok=True)
                save(stability(run, width="double"), target.with_suffix(".png"))
    runs = {variant: overview(rows, variant, folder / f"{model}_{variant}") for variant in
            dict.fromkeys(row["run"] for row in rows)}  # fmt: skip
    recipe, reduced = MODELS[model]
    settings = {"recipe": recipe, "overrides": [*COMMON, *reduced], "variants": VARIANTS}
    finish(rows, target, seen=seen(rows, runs), runs=runs, settings=settings)


def layer_rows(run: Spectra) -> list[Row]:
    """Each layer: stability at the first, the middle and the last measurement, and when it settled."""
    settled = {threshold: settling_steps(run, threshold) for threshold in THRESHOLDS}
    rows = []
    for name, layer in run.items():
        values = layer.stability[np.isfinite(layer.stability)]
        row: Row = {"layer": name, "shape": f"{layer.m} x {layer.n}", "first": float(values[0])}
        row |= {"middle": float(values[len(values) // 2]), "last": float(values[-1])}
        # Infinite means never; JSON has no word for that.
        found = {f"above_{t}_from": settled[t][name] for t in THRESHOLDS}
        rows.append(row | {key: int(step) if np.isfinite(step) else None for key, step in found.items()})
    return rows


def overview(rows: Sequence[Row], variant: str, folder: Path) -> dict[str, Any]:
    """A run in few numbers."""
    mine = [row for row in rows if row["run"] == variant]
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "layers": len(mine),
        **{f"median_{when}": median(mine, when) for when in ("first", "middle", "last")},
        **{f"settled_at_{t}": sum(row[f"above_{t}_from"] is not None for row in mine) for t in THRESHOLDS},
        summary["metric_name"]: summary["metric"],
    }


def median(rows: Sequence[Row], key: str) -> float:
    """Over the layers."""
    return float(np.median([row[key] for row in rows]))


def seen(rows: Sequence[Row], runs: dict[str, dict[str, Any]]) -> list[str]:
    """What the numbers say, in sentences that they are put into."""
    cosine, constant = runs["cosine"], runs["constant"]
    sentences = [
        f"Stability is measured over {FREQUENCY} steps. It rises in the course of training from a median of "
        f"{cosine['median_first']:.3f} over {cosine['median_middle']:.3f} half-way to {cosine['median_last']:.3f} "
        f"at the end, as in the paper."
        if cosine["median_last"] > cosine["median_middle"] > cosine["median_first"]
        else f"Unlike in the paper stability does not rise throughout: medians {cosine['median_first']:.3f}, "
        f"{cosine['median_middle']:.3f} half-way, {cosine['median_last']:.3f} at the end.",
        f"With the cosine schedule {cosine['settled_at_0.95']} of {cosine['layers']} layers reach 0.95 and stay, "
        f"{cosine['settled_at_0.99']} reach 0.99; with a constant learning rate {constant['settled_at_0.95']} and "
        f"{constant['settled_at_0.99']}, and the median ends at {constant['median_last']:.3f}.",
        _decay(cosine, constant),
        *_depth([row for row in rows if row["run"] == "cosine"]),
        *_laggards(rows),
    ]
    if "muon" in runs:
        muon = runs["muon"]
        sentences.append(
            f"Under Muon, whose steps move every direction of a matrix alike, medians are {muon['median_first']:.3f}, "
            f"{muon['median_middle']:.3f} and {muon['median_last']:.3f}; {muon['settled_at_0.95']} of "
            f"{muon['layers']} layers reach 0.95 and stay."
        )
    return sentences


def _decay(cosine: dict[str, Any], constant: dict[str, Any]) -> str:
    """How much of the way from the first measurement to 1 the bases go without the schedule's help."""
    alone = constant["median_last"] - constant["median_first"]
    helped = cosine["median_last"] - cosine["median_first"]
    share = 100 * alone / helped if helped > 0 else float("nan")
    return (
        f"Of the cosine run's rise in the median, a constant rate brings about {share:.0f} %: the rest is the "
        "schedule's doing, since smaller steps turn a basis less, and says nothing of what has been learned."
    )


def _depth(rows: Sequence[Row]) -> list[str]:
    """Whether early or late layers are ahead half-way."""
    order = np.argsort(np.argsort([row["middle"] for row in rows]))
    correlation = float(np.corrcoef(np.arange(len(rows)), order)[0, 1])
    ahead = "late layers are ahead" if correlation > 0 else "early layers are ahead"
    clear = ahead if abs(correlation) > 0.5 else "there is no clear order by depth"
    return [f"Half-way {clear} (rank correlation of depth and stability {correlation:+.2f})."]


def _laggards(rows: Sequence[Row]) -> list[str]:
    """The layers that do not settle."""
    found = []
    for variant in ("cosine", "constant"):
        late = [row for row in rows if row["run"] == variant and row["above_0.9_from"] is None]
        names = ", ".join(f"{row['layer']} ({row['last']:.2f})" for row in late[:8])
        more = f" and {len(late) - 8} more" if len(late) > 8 else ""
        if late:
            found.append(f"Not settled at 0.9 in the {variant} run (last value): {names}{more}.")
    return found or ["Every layer settles at 0.9 in both runs."]


if __name__ == "__main__":
    main()
