"""What engines do, send and hold, what was interrupted, and what works with what."""

from __future__ import annotations

import textwrap
from typing import Any

from benchmarks.pages.tables import load, origin, origins, table


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


def support() -> str:
    """What works with what."""
    from benchmarks.support import summary  # which writes the README, too

    result = load("support")
    return summary(result) + "\n" + origin("support", result["environment"])


def scaling() -> str:
    """Strong and weak scaling, the formula fitted to it, and what it says of many processes."""
    result = load("scaling")
    order = list(result["fits"])
    rows = [
        (
            row["engine"],
            row["scaling"] if row["processes"] > 1 else "one",
            row["side"],
            str(row["nodes"]),
            str(row["batch"]),
            f"{1000 * row['step_s']:.0f} ms",
            f"{row['efficiency']:.2f}",
            f"{row['sent_mb']:.1f} MB",
            f"{row['update_share']:.1%}",
            f"{row['peak_memory_gib']:.2f} GiB",
        )
        for row in sorted(
            result["rows"], key=lambda row: (order.index(row["engine"]), row["nodes"], row["scaling"], row["side"])
        )
    ]
    header = (
        "engine", "scaling", "side", "nodes", "batch", "step", "efficiency", "sent in a step", "updates, of the run",
        "memory",
    )  # fmt: skip
    sentences = []
    for engine, found in result["fits"].items():
        speed = "no limit" if found["bytes_per_s"] is None else f"{found['bytes_per_s'] / 1e6:.0f} MB/s"
        per_sample = ", ".join(f"{1000 * value:.1f} ms {side}" for side, value in found["seconds_a_sample"].items())
        far = [row for row in result["extrapolated"][engine] if row["processes"] in (64, 4096)]
        efficiencies = ", ".join(f"{row['side']} {row['efficiency']:.2f} on {row['processes']:,}" for row in far)
        sentences.append(
            f"Fitted for {engine}: a sample takes {per_sample}; latency {1000 * found['latency_s']:.1f} ms, bandwidth "
            f"{speed}; {found['mean_relative_error']:.0%} of a step are left unexplained. The formula's weak scaling on "
            f"processes that share nothing but such a network: {efficiencies}."
        )
    text = textwrap.fill(" ".join(sentences), 118)
    return f"{table(header, rows)}\n\n{text}\n{origin('scaling', result['environment'])}"
