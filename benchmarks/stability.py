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
from hpc_oialr.report.plots import save, stability
from hpc_oialr.report.runs import settling_steps
from hpc_oialr.spectra import Spectra
from hpc_oialr.spectra import open as open_spectra

STEPS, FREQUENCY = 400, 20
THRESHOLDS = (0.9, 0.95, 0.99)
MEASURES = ("subspace_angle_U", "r_factor_distance")
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
                save(stability(run, width="double"), target.with_suffix(".png"), force=True)
    runs = {variant: overview(rows, variant, folder / f"{model}_{variant}") for variant in
            dict.fromkeys(row["run"] for row in rows)}  # fmt: skip
    recipe, reduced = MODELS[model]
    settings = {"recipe": recipe, "overrides": [*COMMON, *reduced], "variants": VARIANTS}
    finish(rows, target, seen=seen(rows, runs), runs=runs, settings=settings)


def layer_rows(run: Spectra) -> list[Row]:
    """Each layer: stability at the first, the middle and the last measurement, and when it settled."""
    settled = {threshold: settling_steps(run, threshold) for threshold in THRESHOLDS}
    rows: list[Row] = []
    for name, layer in run.items():
        values = layer.stability[np.isfinite(layer.stability)]
        row: Row = {"layer": name, "shape": f"{layer.m} x {layer.n}", "first": float(values[0])}
        row |= {"middle": float(values[len(values) // 2]), "last": float(values[-1])}
        for measure in MEASURES:
            # Those of runs made before there were such measures are NaN.
            known = layer[measure][np.isfinite(layer[measure])]
            row[measure] = [float(known[0]), float(known[-1])] if len(known) else None
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
        **{measure: _medians(mine, measure) for measure in MEASURES},
        **{f"settled_at_{t}": sum(row[f"above_{t}_from"] is not None for row in mine) for t in THRESHOLDS},
        summary["metric_name"]: summary["metric"],
    }


def _medians(rows: Sequence[Row], measure: str) -> list[float] | None:
    """Over the layers, at the first and the last measurement."""
    known = [row[measure] for row in rows if row[measure] is not None]
    return np.median(known, axis=0).tolist() if known else None


def median(rows: Sequence[Row], key: str) -> float:
    """Over the layers."""
    return float(np.median([row[key] for row in rows]))


def seen(rows: Sequence[Row], runs: dict[str, dict[str, Any]]) -> list[str]:
    """What the numbers say, in sentences that they are put into."""
    cosine, constant = runs["cosine"], runs["constant"]
    lowest = min(row["first"] for row in rows if row["run"] != "muon")
    return [
        _course(cosine),
        f"With the cosine schedule {_settled(cosine)}; with a constant learning rate {_settled(constant)}, and the "
        f"median ends at {constant['median_last']:.5f}.",
        f"The level itself says little: in {FREQUENCY} steps of this size a basis can hardly turn, and already the "
        f"first measurement, at step {2 * FREQUENCY}, lies at {lowest:.3f} or above. What tells is how it changes.",
        _decay(cosine, constant),
        *_angles(runs),
        *_depth([row for row in rows if row["run"] == "cosine"]),
        *_laggards(rows),
        *([_muon(runs["muon"])] if "muon" in runs else []),
    ]


def _course(cosine: dict[str, Any]) -> str:
    first, middle, last = (cosine[f"median_{when}"] for when in ("first", "middle", "last"))
    course = f"{first:.5f} at first, {middle:.5f} half-way, {last:.5f} at the end"
    if last > middle > first:
        return f"As in the paper stability, here over {FREQUENCY} steps, rises with training: median {course}."
    return f"Unlike in the paper stability, here over {FREQUENCY} steps, does not rise throughout: median {course}."


def _settled(run: dict[str, Any]) -> str:
    return f"{run['settled_at_0.95']} of {run['layers']} layers stay above 0.95 and {run['settled_at_0.99']} above 0.99"


def _muon(run: dict[str, Any]) -> str:
    return (
        "Under Muon at its recipe's learning rate, whose steps move all directions of a matrix alike, the medians are "
        f"{run['median_first']:.3f}, {run['median_middle']:.3f} and {run['median_last']:.3f}; {_settled(run)}."
    )


def _decay(cosine: dict[str, Any], constant: dict[str, Any]) -> str:
    """How much of the way from the first measurement to 1 the bases go without the schedule's help."""
    alone = constant["median_last"] - constant["median_first"]
    helped = cosine["median_last"] - cosine["median_first"]
    share = 100 * alone / helped if helped > 0 else float("nan")
    return (
        f"Of the cosine run's rise in the median, a constant rate brings about {share:.0f} %: the rest is the "
        "schedule's doing, since smaller steps turn a basis less, whatever has been learned."
    )


def _angles(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What single directions do, which stability, a mean over all, hides."""
    found = []
    for variant in ("cosine", "constant"):
        angles, distances = (runs[variant][measure] for measure in MEASURES)
        if angles is not None:
            found.append(
                f"In the {variant} run the largest angle between the leading quarters of successive U goes from "
                f"{angles[0]:.2f} to {angles[1]:.2f} rad, and the distance of successive R from {distances[0]:.3f} "
                f"to {distances[1]:.3f} of its norm (medians over the layers)."
            )
    return found


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
