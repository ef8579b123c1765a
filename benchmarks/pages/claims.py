"""Sentences of README and docs that name a measured figure, each with the figures of the committed result files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from statistics import mean
from typing import Any

from benchmarks.budgets import PER_DENSE_EPOCH, accuracies, over_four_epochs
from benchmarks.pages.tables import load

GPU = "gpu_nvidia_h100_80gb_hbm3"


def missing(page: str, text: str) -> list[str]:
    """What a page, by its path in the repository, should say by the result files, and does not."""
    flat = " ".join(text.split())
    return [claim for where, claim in claims() if where == page and claim not in flat]


def claims() -> Iterator[tuple[str, str]]:
    """Each page's name and what must stand in it, in one line."""
    for page, template, figures in CLAIMS:
        yield page, template.format(**figures())


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _short(value: float) -> str:
    """Two digits without a leading zero or a trailing one."""
    return re.sub(r"^0|(?<=\.\d)0$", "", f"{value:.2f}")


def _demo() -> dict[str, Any]:
    return {"time": round(10 * load("demo")["ratios"]["wall"]) * 10}


def _budgets() -> dict[str, Any]:
    """An epoch of dense training and OIALR's in its time, on a CPU; where OIALR is ahead on an H100, and by how much."""
    alone, found = (accuracies(load(name)["rows"]) for name in ("budgets", "budgets_h100"))
    times = sorted(epochs for run, epochs in found if run == "dense")
    ahead = {t: mean(found["OIALR", PER_DENSE_EPOCH * t]) - mean(found["dense", t]) for t in times}
    assert ahead.pop(4.0) < 0
    return {
        "oialr": f"{mean(alone['OIALR', PER_DENSE_EPOCH]):.2f}",
        "dense": f"{mean(alone['dense', 1.0]):.2f}",
        "least": f"{min(ahead.values()):.1f}",
        "most": f"{max(ahead.values()):.1f}",
    }


def _trials() -> dict[str, Any]:
    """Four dense epochs, and of the trials the one with the fewest errors."""
    found = accuracies(load("budgets_h100")["rows"])["dense", 4.0]
    best = max(load("budgets_trials")["rows"], key=lambda row: row["test_accuracy"])
    (dense,) = (row for row in load("budgets")["rows"] if row["run"] == "dense")
    first, second = (f"{value:.2f}" for value in found)
    behind = _short(mean(found) - 100 * best["test_accuracy"])
    return {"first": first, "second": second, "behind": behind, "time": _short(over_four_epochs(best, dense))}


def _gpu_steps() -> dict[str, Any]:
    """Fastest low-rank over fastest dense step of each model; the mini ViT in eager mode."""
    rows = load(GPU)["sections"]["step"]["rows"]

    def fastest(model: str, r_over_k: float | None, mode: str = "") -> float:
        found = (row for row in rows if (row["model"], row["r_over_k"]) == (model, r_over_k))
        return min(row["ms"] for row in found if mode in row["mode"])

    ratios = [fastest(model, 0.25) / fastest(model, None) for model in {row["model"] for row in rows}]
    eager = fastest("mini ViT", 0.25, "eager") / fastest("mini ViT", None, "eager")
    return {"least": _short(min(ratios)), "most": _short(max(ratios)), "eager": f"{eager:.2f}"}


def _cifar() -> dict[str, Any]:
    rows = load("cifar_h100")["rows"]
    named = {
        "dense": "dense Muon",
        "cores": "cores, r 320",
        "quarter": "OIALR k/4, cores alone",
        "follow": "OIALR k/4, bases that follow",
    }
    found = {name: [row["accuracy"] for row in rows if row["run"] == run] for name, run in named.items()}
    means = {name: mean(values) for name, values in found.items()}
    assert len(found["dense"]) == len(found["cores"]) == 3
    return {name: _points(value) for name, value in means.items()} | {
        "share": round(100 * next(row["trained_share"] for row in rows if row["run"] == "cores, r 320")),
        "behind": _short(100 * (means["dense"] - means["cores"])),
    }


def _text() -> dict[str, Any]:
    """Over the seed that all have: the best dense run, the one at the rate of the others, the best low-rank ones."""
    rows = [row for row in load("text")["rows"] if row["seed"] == 0]
    dense = {row["run"]: row["test_loss"] for row in rows if "dense" in row["run"]}
    cores = min(row["test_loss"] for row in rows if "cores" in row["run"])
    trained = min(row["test_loss"] for row in rows if "bases trained" in row["run"])
    alike = dense["dense, rate 0.01"]
    return {
        "best": _short(min(dense.values())),
        "alike": _short(alike),
        "cores": _short(cores),
        "trained": _short(trained),
        "gap": _short(trained - alike),
    }


def _growth() -> dict[str, Any]:
    rows = {row["run"]: row["accuracy"] for row in load("bases_trained")["rows"]}
    return {"growing": _points(rows["cores, growing by 1/8"]), "cores": _points(rows["cores"])}


def _shards() -> dict[str, Any]:
    lost = [100 * (1 - row["tar, read and decode / decode"]) for row in load("image_shards")["rows"]]
    return {"most": round(max(lost))}


def _detection() -> dict[str, Any]:
    result = load("detection")
    seen = [row for row in result["rows"] if row["rho"] >= 1.5]
    speedups = [row["speedup"] for row in result["timing"]]
    assert not any(row["detected"] for row in result["rows"] if row["rho"] < 1)
    return {
        "off": f"{max(row['alignment_error'] for row in seen):.3f}".lstrip("0"),
        "weak": f"{max(row['standard_error'] for row in seen if row['rho'] == 1.5):.3f}".lstrip("0"),
        "strong": f"{max(row['standard_error'] for row in seen if row['rho'] > 1.5):.3f}".lstrip("0"),
        "least": f"{min(speedups):.1f}",
        "most": f"{max(speedups):.0f}",
    }


CLAIMS: tuple[tuple[str, str, Callable[[], dict[str, Any]]], ...] = (
    ("README.md", "it needed about {time} % of the time of dense training", _demo),
    ("README.md", "5.5 epochs and one of dense Muon gave {oialr} % and {dense} %", _budgets),
    ("README.md", "At up to two dense epochs OIALR is ahead by {least} to {most} points", _budgets),
    ("README.md", "a quarter of the rank took {least} to {most} of the fastest dense ones", _gpu_steps),
    ("README.md", "the mini ViT (17 tokens per image) takes {eager} times as long eager", _gpu_steps),
    ("README.md", "cores of r = 320, {share} % of the parameters, are {behind} points behind dense Muon", _cifar),
    ("README.md", "dense {alike} and {best} at its best rate, cores {cores}, bases trained again {trained}", _text),
    ("docs/method.md", "four epochs has {first} and {second} % of the test images right", _trials),
    ("docs/method.md", "are {behind} points behind the mean of the two in {time} of its time", _trials),
    ("docs/method.md", "dense Muon {dense}, cores of r = 320 of 768 {cores}", _cifar),
    ("docs/method.md", "cores of r = 192 {quarter}, with bases trained again from 70 % on {follow}", _cifar),
    ("docs/method.md", "low rank is {gap} nats a byte behind dense training at its own rate", _text),
    ("docs/method.md", "it did not: {growing} against {cores} of frozen bases", _growth),
    ("docs/method.md", "the alignment is within {off} of this size's prediction", _detection),
    ("docs/method.md", "(standard error up to {weak} at 1.5, up to {strong} above)", _detection),
    ("docs/method.md", "TensorLy's to 1e-12, {least} to {most} times as fast", _detection),
    ("docs/data.md", "Reading takes up to {most} % from the decoder's own speed", _shards),
)
