"""Accuracy against time: the demo, longer budgets, CIFAR-10, ETT, and how bases settle."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.budgets import PER_DENSE_EPOCH, accuracies
from benchmarks.pages.tables import load, origin, origins, table


def demo() -> str:
    """The demo's table."""
    result = load("demo")
    dense, oialr, ratios = result["dense"], result["oialr"], result["ratios"]
    difference, at_wall = 100 * result["metric_difference"], 100 * result["dense_metric_at_oialr_wall"]
    rows = [
        (
            "test accuracy",
            f"{100 * dense['metric']:.2f} %",
            f"{100 * oialr['metric']:.2f} %",
            f"{difference:+.2f} points",
        ),
        (
            "dense accuracy at OIALR's wall time",
            f"{at_wall:.2f} %",
            "",
            f"{100 * oialr['metric'] - at_wall:+.2f} points",
        ),
        ("training time", f"{dense['wall_s']:.0f} s", f"{oialr['wall_s']:.0f} s", f"x {ratios['wall']:.2f}"),
        (
            "trained parameters at the end",
            f"{dense['trainable_params']:,}",
            f"{oialr['trainable_params']:,}",
            f"x {ratios['trainable']:.3f}",
        ),
        (
            "peak memory of all tensors",
            f"{1024 * dense['peak_memory_gib']:.1f} MiB",
            f"{1024 * oialr['peak_memory_gib']:.1f} MiB",
            f"x {ratios['peak_memory']:.3f}",
        ),
        ("steps", str(dense["steps"]), str(oialr["steps"]), ""),
        (
            "time of all SVDs and updates",
            "",
            f"{oialr['update_wall_s']:.2f} s",
            f"{oialr['update_wall_s'] / oialr['wall_s']:.1%}",
        ),
    ]
    return table(("", "dense", "OIALR", "OIALR / dense"), rows) + "\n" + origin("demo", result["environment"])


def budgets() -> str:
    """The demo's model at several budgets: accuracies of both sides, and what their epochs cost on a CPU."""
    results = {name: load(name) for name in ("budgets", "budgets_h100")}
    timed, judged = (result["rows"] for result in results.values())
    epoch_s = {row["run"]: row["cpu_s"] / row["epochs"] for row in timed}
    found, rows = accuracies(judged), []
    for side, epochs in sorted(found, key=lambda key: key[1]):
        if side == "dense" and (others := found.get(("OIALR", PER_DENSE_EPOCH * epochs))):
            ratio = PER_DENSE_EPOCH * epoch_s["OIALR"] / epoch_s["dense"]
            each = (", ".join(f"{value:.2f} %" for value in values) for values in (found[side, epochs], others))
            rows.append((f"{epochs:g}", f"{PER_DENSE_EPOCH * epochs:g}", *each, f"x {ratio:.2f}"))
    header = ("epochs, dense", "OIALR", "test accuracy, dense, a seed each", "OIALR", "CPU time, OIALR over dense")
    return table(header, rows) + "\n" + origins(results)


def cifar() -> str:
    """Dense and low rank on a part of CIFAR-10, each budget a run of its own."""
    result = load("cifar_small")
    dense = sorted((row["cpu_s"], row["accuracy"]) for row in result["rows"] if row["trained_share"] == 1)
    seconds, accuracies = zip(*dense, strict=True)
    rows = []
    for row in sorted(result["rows"], key=lambda row: row["cpu_s"]):
        before, after = row["before_conversion"], row["after_conversion"]
        outside = before is None or not seconds[0] <= row["cpu_s"] <= seconds[-1]
        then = row["accuracy"] - np.interp(row["cpu_s"], seconds, accuracies)
        rows.append((
            row["run"],
            f"{row['epochs']:g}",
            f"{row['cpu_s']:.0f} s",
            f"{100 * row['accuracy']:.1f} %",
            "" if outside else f"{100 * then:+.1f} points",
            "" if before is None else f"{100 * before:.1f} % to {100 * after:.1f} %",
            f"{row['trained_share']:.1%}",
        ))  # fmt: skip
    columns = (
        "CPU time of training", "test accuracy", "against dense of that time", "at the conversion", "trained at the end"
    )  # fmt: skip
    return table(("run", "epochs", *columns), rows) + "\n" + origin("cifar_small", result["environment"])


def cifar_gpu() -> str:
    """The mini ViT on all of CIFAR-10, on a GPU, at one length."""
    result = load("cifar_h100")
    finished = [row for row in result["rows"] if "accuracy" in row]
    rows = []
    for run in dict.fromkeys(row["run"] for row in finished):
        mine = sorted((row for row in finished if row["run"] == run), key=lambda row: int(row["seed"]))
        before, after = (mine[0][f"{when}_conversion"] for when in ("before", "after"))
        rows.append((
            run,
            f"{mine[0]['epochs']:g}",
            ", ".join(f"{100 * row['accuracy']:.2f} %" for row in mine),
            ", ".join(f"{row['train_s']:.1f} s" for row in mine if "beside" not in row),
            f"{mine[0]['update_s']:.1f} s" if before else "",
            f"{100 * before:.1f} % to {100 * after:.1f} %" if before else "",
            f"{mine[0]['trained_share']:.1%}",
        ))  # fmt: skip
    columns = (
        "test accuracy, a seed each",
        "training, alone on the GPU",
        "of it conversion and updates",
        "at the conversion",
    )
    text = table(("run", "epochs", *columns, "trained at the end"), rows) + "\n"
    return text + origin("cifar_h100", result["environment"])


def text() -> str:
    """GPT-2 on bytes: the loss at equal tokens, dense runs by rate."""
    result = load("text")
    rows = []
    for run in sorted({row["run"] for row in result["rows"]}, key=lambda run: ("dense" not in run, run)):
        mine = [row for row in result["rows"] if row["run"] == run]
        rows.append((
            run,
            ", ".join(f"{row['test_loss']:.3f}" for row in mine),
            ", ".join(f"{row['train_s']:.1f} s" for row in mine),
            f"{np.mean([row['update_s'] for row in mine]):.1f} s" if "dense" not in run else "",
            f"{mine[0]['trained_share']:.1%}",
        ))  # fmt: skip
    header = ("run", "test loss, nats a byte, a seed each", "training", "of it updates", "trained at the end")
    return table(header, rows) + "\n" + origin("text", result["environment"])


def settings() -> str:
    """What was tried for the demo."""
    result = load("demo_settings")
    rows = [
        (
            row["run"],
            f"{100 * row['accuracy_mean']:.2f} %",
            f"{100 * row['accuracy_min']:.2f} %",
            f"{row['cpu_s']:.0f} s",
            f"{row['trained_share']:.1%}",
        )
        for row in result["summary"]
    ]
    seeds = result["summary"][0]["seeds"]
    header = (
        "run",
        f"validation accuracy, mean of {seeds} seed{'s' * (seeds > 1)}",
        "worst",
        "CPU time",
        "trained at the end",
    )
    return table(header, rows) + "\n" + origin("demo_settings", result["environment"])


def ett() -> str:
    """Autoformer on ETT beside the published errors."""
    result = load("ett")
    found: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in result["rows"]:
        name = f"{row['dataset'].replace('ett', 'ETT')}, {row['size']} size"
        found.setdefault((name, row["horizon"], row["run"]), []).append(row)
    rows = []
    for (name, horizon, side), runs in sorted(found.items()):
        errors, shares = ([run[key] for run in runs] for key in ("test_mse", "trained_share"))
        spread = f" ({min(errors):.3f} to {max(errors):.3f})" if len(errors) > 1 else ""
        epochs = ", ".join(f"{10 * run['best_step'] / run['steps_of_ten_epochs']:.0f}" for run in runs)
        published = f"{runs[0]['published_mse']:.3f}"
        error, share = f"{np.mean(errors):.3f}{spread}", f"{np.mean(shares):.1%}"
        rows.append((name, str(horizon), side, str(len(runs)), error, published, share, epochs))
    header = ("data", "horizon", "run", "seeds", "test MSE", "published", "trained at the end", "best epochs")
    return table(header, rows) + "\n" + origin("ett", result["environment"])


def convolutions() -> str:
    """Convolutions in each form; means over seeds."""
    result = load("convolutions")
    rows, dense_s = [], np.mean([row["cpu_s"] for row in result["rows"] if row["run"] == "dense"])
    for name in dict.fromkeys(row["run"] for row in result["rows"]):
        mine = [row for row in result["rows"] if row["run"] == name]
        seconds = np.mean([row["cpu_s"] for row in mine])
        rows.append((
            name,
            ", ".join(f"{100 * row['test_accuracy']:.2f}" for row in mine),
            f"{seconds:.0f} s",
            f"x {seconds / dense_s:.2f}",
            f"{mine[0]['trained_share']:.1%}",
        ))  # fmt: skip
    header = (
        "convolutions",
        "test accuracy (%), each seed",
        "CPU time of training",
        "over dense",
        "trained at the end",
    )
    return table(header, rows) + "\n" + origin("convolutions", result["environment"])


def stability() -> str:
    """How the bases of dense trainings settle."""
    results = {name: load(name) for name in ("stability_vit", "stability_convnet", "stability_gpt")}
    rows = []
    for result in results.values():
        for variant, run in result["runs"].items():
            recipe = f"`{result['settings']['recipe']}`"
            optimizer = {"muon": "Muon, cosine"}.get(variant, f"AdamW, {variant}")
            medians = [f"{run[f'median_{when}']:.4f}" for when in ("first", "middle", "last")]
            angle, distance = (
                " to ".join(f"{value:.2f}" for value in run[name]) for name in ("subspace_angle_U", "r_factor_distance")
            )
            rows.append((recipe, optimizer, *medians, angle, distance))
    header = (
        "model, trained dense",
        "optimizer, schedule",
        "stability, first",
        "half-way",
        "last",
        "angle (rad)",
        "change of R",
    )
    return table(header, rows) + "\n" + origins(results)
