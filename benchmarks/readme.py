"""Writes the README's tables from the committed result files, so that no number there is typed by hand.

`python -m benchmarks.readme` rewrites what stands between the markers `<!-- NAME -->` and
`<!-- end NAME -->`; with `--check` it changes nothing, and the exit code is 1 if the README is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any]:
    """A committed result file."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def origin(name: str, environment: dict[str, Any]) -> str:
    """One line: file, machine, versions, date."""
    machine, packages = environment["machine"], environment["packages"]
    where = f"{machine['cpu']}, {machine['cores']} cores"
    return f"\n*`benchmarks/results/{name}.json`: {where}, torch {packages['torch']}, {environment['date'][:10]}.*"


def origins(results: Mapping[str, dict[str, Any]]) -> str:
    """A line for each file, by its name."""
    return "".join(origin(name, result["environment"]) for name, result in results.items())


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
    """The two runs of the demo at longer budgets, and the dense accuracy when OIALR's longest run ended."""
    result = load("budgets")
    ordered = sorted(result["rows"], key=lambda row: (row["cpu_s"], row["seed"]))
    rows = []
    for row in ordered:
        stopped, epochs = row.get("stopped_after_epochs"), f"{row['epochs']:g}"
        rows.append((
            row["run"],
            epochs if stopped is None else f"stopped after {stopped:g} of {epochs}",
            f"{row['cpu_s']:.0f} s",
            f"{100 * row['test_accuracy']:.2f} %",
            f"{row['trained_share']:.1%}",
        ))  # fmt: skip
    header = ("run", "epochs", "CPU time of training", "test accuracy", "trained at the end")
    sides = {row["run"]: row for row in ordered}  # the longest of each
    oialr, dense = sides["OIALR"], sides["dense"]
    _, seconds, accuracies = zip(*dense["curve"], strict=True)
    then = np.interp(oialr["cpu_s"], seconds, accuracies)
    remark = (
        f"When OIALR's longest run ended, after {oialr['cpu_s']:.0f} s, the longest dense run was at "
        f"{100 * then:.1f} %, in the middle of its schedule; at its last evaluation, after {seconds[-1]:.0f} s, it was "
        f"at {100 * accuracies[-1]:.1f} %. One seed; the standard error of each figure is 0.3 points."
    )
    return f"{table(header, rows)}\n\n{textwrap.fill(remark, 118)}\n{origin('budgets', result['environment'])}"


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
        mine = [row for row in finished if row["run"] == run]
        before, after = (mine[0][f"{when}_conversion"] for when in ("before", "after"))
        rows.append((
            run,
            f"{mine[0]['epochs']:g}",
            ", ".join(f"{100 * row['accuracy']:.2f} %" for row in mine),
            ", ".join(f"{row['train_s']:.1f} s" for row in mine),
            f"{mine[0]['update_s']:.1f} s" if before else "",
            f"{100 * before:.1f} % to {100 * after:.1f} %" if before else "",
            f"{mine[0]['trained_share']:.1%}",
        ))  # fmt: skip
    columns = ("test accuracy, a seed each", "training", "of it conversion and updates", "at the conversion")
    text = table(("run", "epochs", *columns, "trained at the end"), rows) + "\n"
    return text + origin("cifar_h100", result["environment"])


def layer() -> str:
    """Layer speed, fp32 and bf16."""
    result = load("layer")
    rows = [
        (
            f"{row['m']} x {row['n']}",
            row["dtype"],
            f"{row['r'] / min(row['m'], row['n']):g} k",
            f"{row['flop_ratio']:.2f}",
            f"{row['time_ratio']:.2f}",
            f"{row['rebuild_ratio']:.2f}",
        )
        for row in result["rows"]
        if row["r"] / min(row["m"], row["n"]) <= 0.5
    ]
    header = ("layer", "dtype", "r", "operations", "time, factored", "time, rebuilding W")
    tuned = [row["dense_onednn_ratio"] for row in result["rows"] if row["dtype"] == "float32"]
    remark = (
        "Dense is PyTorch's `nn.Linear`. In float32 the factored products use oneDNN; a dense layer through "
        f"oneDNN would take {min(tuned):.2f} to {max(tuned):.2f} of its time."
    )
    return f"{table(header, rows)}\n\n{remark}\n{origin('layer', result['environment'])}"


def step() -> str:
    """Step speed of ViT-B/16."""
    result = load("step")
    rows = [
        (
            row["dtype"],
            f"{row['r_fraction']:g} k",
            f"{row['time_ratio']:.2f}",
            f"{row['peak_memory_ratio']:.2f}",
            f"{row['trainable_share']:.1%}",
        )
        for row in result["rows"]
    ]
    header = ("dtype", "r", "step time / dense", "peak memory / dense", "trained")
    return table(header, rows) + "\n" + origin("step", result["environment"])


def serve() -> str:
    """Factored inference: time and size over dense."""
    result = load("serve")
    rows = [
        (
            row["model"],
            f"{row['r_fraction']:g} k",
            str(row["batch"]),
            "{:.2f} [{:.2f} to {:.2f}]".format(row["time_ratio"], *row["spread"]),
            f"{row['size_ratio']:.2f}",
        )
        for row in result["rows"]
        if row["form"] == "factored"
    ]
    header = ("model", "r", "batch", "time / dense [10 % to 90 % of the rounds]", "size / dense")
    unfolded = [row["time_ratio"] for row in result["rows"] if row["form"] == "as trained"]
    remark = f"As trained, with the core as a third factor, it would be {min(unfolded):.2f} to {max(unfolded):.2f}."
    return f"{table(header, rows)}\n\n{remark}\n{origin('serve', result['environment'])}"


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


def engines() -> str:
    """Each engine's memory, and how far its losses are from those of one process."""
    memory, tables = load("memory"), {name: load(name) for name in ("engines", "engines_text")}
    rows = []
    for row in (row for row in memory["rows"] if row["kind"] == "phases"):
        rows.append((
            f"`{row['engine']}`",
            row["optimizer"],
            f"{row['dense_mib']:.0f} MiB, x {row['dense_ratio']:.2f}",
            f"{row['low_rank_mib']:.1f} MiB, x {row['low_rank_ratio']:.2f}",
            *(
                _largest_difference(equal["rows"], row, precision)
                for equal in tables.values()
                for precision in ("float64", "fp32")
            ),
        ))  # fmt: skip
    header = (
        "engine",
        "optimizer",
        "dense, per process",
        "r = k/4, per process",
        "loss difference, images, float64",
        "fp32",
        "text, float64",
        "fp32",
    )
    full = load("engines_full")
    sources = {"memory": memory} | tables | {"engines_full": full}
    sentence = f"\nAt the recipes' full size, in fp32: {_in_full_size(full['rows'])}.\n"
    return table(header, rows) + "\n" + sentence + origins(sources)


def _in_full_size(rows: list[dict[str, Any]]) -> str:
    """The largest difference of each recipe, and of which engines."""
    parts = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == recipe and row["precision"] == "fp32"]
        engines = ", ".join(dict.fromkeys(f"`{row['engine']}`" for row in mine))
        largest = max(row["largest_relative_loss_difference"] for row in mine)
        same = "the same r" if all(row["same_r"] for row in mine) else "not the same r"
        parts.append(f"`{recipe}` {largest:.0e} and {same} ({engines})")
    return ", ".join(parts)


def _largest_difference(equal: list[dict[str, Any]], row: dict[str, Any], precision: str) -> str:
    """Of all numbers of processes, with the row's engine and optimizer; a recipe's own one is MuonAdamW."""
    adamw = row["optimizer"] == "AdamW"
    found = [
        other["largest_relative_loss_difference"]
        for other in equal
        if (other["engine"], other["precision"]) == (row["engine"], precision)
        and other.get("steps")
        and ("--optimizer AdamW" in other["settings"]) == adamw
    ]
    return f"{max(found):.0e}" if found else ""


def traffic() -> str:
    """Bytes of gradients in a step of ViT-B/16."""
    result = load("traffic")
    rows = [
        (
            f"`{row['engine']}`",
            "dense" if row["r_fraction"] == 1 else f"r = {row['r_fraction']:g} k",
            f"{row['gradient_bytes'] / 1e6:.1f} MB",
            f"{row['of_dense_ddp']:.1%}",
        )
        for row in result["rows"]
        if row["engine"] == "ddp"
    ]
    header = ("engine", "", "gradients sent per step", "of dense")
    return table(header, rows) + "\n" + origin("traffic", result["environment"])


def plan() -> str:
    """What ``oialr plan`` predicts, against measurement."""
    result = load("plan")
    places = dict.fromkeys((row["recipe"], row["processes"]) for row in result["rows"])
    rows = []
    for recipe, processes in places:
        mine = [row for row in result["rows"] if (row["recipe"], row["processes"]) == (recipe, processes)]
        memory = [row["memory_ratio"] for row in mine]
        times = [f"{row['time_ratio']:.2f}" for row in mine if "time_ratio" in row]
        rows.append((f"`{recipe}`", str(processes), f"{min(memory):.2f} to {max(memory):.2f}", *times))
    header = ("recipe", "processes", "memory, all phases", "step, dense", "step, converted", "step, end")
    return table(header, rows) + "\n" + origin("plan", result["environment"])


def life() -> str:
    """Ten interruptions of two runs in a row."""
    result = load("slurm_life")
    rows = []
    for submitted in ("sbatch", "oialr submit"):
        mine = [row for row in result["rows"] if row["what"].startswith(submitted)]
        *blows, end = mine
        again = [row["steps done again"] for row in blows]
        names = ", ".join(dict.fromkeys(row["what"].partition(": ")[2].replace("_", " ") for row in blows))
        ended = "bitwise identical to an uninterrupted run" if end["as it must"] else "differs"
        rows.append((f"`{submitted}`", f"{len(blows)}: {names}", f"{max(again)}", ended))
    header = ("submitted by", "interruptions in a row", "most steps repeated", "end")
    return table(header, rows) + "\n" + origin("slurm_life", result["environment"])


def record() -> str:
    """What recording costs, and how long a large report takes to open."""
    writing, page = load("record"), load("report")
    row, report = writing["rows"][0], page["rows"][0]
    text = (
        f"Recording costs {row['overhead']:.2%} (95 % interval: {row['overhead_low']:.2%} to "
        f"{row['overhead_high']:.2%}) of a step of `{row['recipe']}` with an event every {row['steps_a_block']} steps, "
        f"and {row['overhead_if_nothing_overlapped']:.2%} if nothing overlapped with "
        f"the training. The report of a run of {report['layers']} layers and {report['updates']} updates is "
        f"{report['page_mib']:.0f} MiB large and is drawn after {report['load_median_s']:.1f} s."
    )
    return textwrap.fill(text, 118) + "\n" + origins({"record": writing, "report": page})


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


def support() -> str:
    """What works with what."""
    from benchmarks.support import summary  # which writes the README, too

    result = load("support")
    return summary(result) + "\n" + origin("support", result["environment"])


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


def image_shards() -> str:
    """Random reads of images from tar shards and HDF5."""
    result = load("image_shards")
    rows = []
    for row in result["rows"]:
        side = row["decoded_side"]
        name = f"{row['images']}, {row['mean_bytes'] / 1024:.1f} KiB, decoded to {side} x {side}"
        for way in ("tar", "HDF5"):
            rates = [f"{row[f'{way}, {what} (1/s)']:,.0f}" for what in ("read", "read and decode")]
            rows.append((name, way, *rates, f"{row[f'{way}, read and decode / decode']:.2f}", ""))
        rows[-2] = (*rows[-2][:-1], f"{row['reader, whole batches / decode']:.2f}")
    header = (
        "images",
        "format",
        "read, 1/s",
        "read and decode, 1/s",
        "over decoding alone",
        "reader over decoding alone",
    )
    return table(header, rows) + "\n" + origin("image_shards", result["environment"])


def gpu() -> str:
    """Layers, steps and updates on one GPU."""
    from benchmarks.gpu.measured import summary  # which uses this file's helpers

    return summary()


BLOCKS: dict[str, Callable[[], str]] = {
    "demo": demo,
    "budgets": budgets,
    "cifar": cifar,
    "cifar_gpu": cifar_gpu,
    "gpu": gpu,
    "ett": ett,
    "image_shards": image_shards,
    "layer": layer,
    "step": step,
    "serve": serve,
    "settings": settings,
    "engines": engines,
    "traffic": traffic,
    "plan": plan,
    "life": life,
    "record": record,
    "stability": stability,
    "support": support,
}


def rendered(text: str) -> str:
    """The README with every block regenerated."""
    for name, block in BLOCKS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if pattern.search(text):
            body = block()
            text = pattern.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a page is out of date")
    before = {page: page.read_text() for page in (ROOT / "README.md", ROOT / "docs" / "data.md")}
    after = {page: rendered(text) for page, text in before.items()}
    if parser.parse_args(arguments).check:
        sys.exit(before != after)
    for page, text in after.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
