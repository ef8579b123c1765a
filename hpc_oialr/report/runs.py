"""Reads run folders, and computes what the page and the plots show."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from numpy.typing import NDArray

from hpc_oialr import spectra
from hpc_oialr.errors import DataError
from hpc_oialr.record.metrics import read_metrics
from hpc_oialr.record.run_folder import RunFolder
from hpc_oialr.redaction import mask_tree
from hpc_oialr.spectra import Layer, Spectra
from hpc_oialr.spectra.files import record_files
from hpc_oialr.system_errors import read_json, read_text

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A loss or metric over a run's steps, with the seconds of training so far and the share of trained parameters.

    All arrays have the shape (points,); NaN where a number is missing.
    """

    name: str
    step: NDArray[np.int64]
    wall_s: Numbers
    share: Numbers
    value: Numbers

    def __len__(self) -> int:
        return len(self.step)

    def at(self, wall_s: float) -> float | None:
        """The value after ``wall_s`` seconds of training, interpolated; None before the first point."""
        if not len(self) or wall_s < self.wall_s[0]:
            return None
        return float(np.interp(wall_s, self.wall_s, self.value))


def _curve(rows: list[dict[str, Any]], key: str, name: str) -> Curve:
    def column(field: str) -> Numbers:
        values = (row.get(field) for row in rows)
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    steps = np.array([row["step"] for row in rows], dtype=np.int64)
    return Curve(name, steps, column("wall_s"), column("trained_share"), column(key))


def _json(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.exists() else None
    return content if isinstance(content, dict) else {}


class Run:
    """A run's folder, or the ``spectra.h5`` in it; parts whose files are missing are empty.

    ``name`` is its label. Raises :class:`DataError` without a run or a record of spectra.
    """

    def __init__(self, path: Path | str) -> None:
        path = Path(path)
        self.folder = RunFolder(path if path.is_dir() else path.parent)
        self.name = self.folder.path.resolve().name
        self._record = path if path.is_file() else self.folder.spectra
        if not (self.folder.holds_run or record_files(self._record)):
            raise DataError(f"{path} holds no run; must be the folder of a run, of oialr compare, or a spectra.h5.")

    @functools.cached_property
    def spectra(self) -> Spectra | None:
        """The record of spectra, None if the run recorded none; close it by :meth:`close`."""
        return spectra.open(self._record) if record_files(self._record) else None

    @functools.cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl``."""
        return read_metrics(self.folder.metrics) if self.folder.metrics.exists() else []

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """``summary.json``; empty until the run has ended."""
        return _json(self.folder.summary)

    @property
    def environment(self) -> dict[str, Any]:
        """Versions and machine."""
        return _json(self.folder.environment) or (self.spectra.environment if self.spectra else {})

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Its settings, with secrets masked."""
        path = self.folder.config
        if not path.exists():
            return self.spectra.config if self.spectra else {}
        try:
            return cast(dict[str, Any], mask_tree(yaml.safe_load(read_text(path)) or {}))
        except yaml.YAMLError as error:
            raise DataError(f"{path} is not valid YAML ({' '.join(str(error).split())}).") from None

    @property
    def dense(self) -> bool:
        """Whether it trained dense throughout."""
        return "oialr" in self.config and self.config["oialr"] is None

    @functools.cached_property
    def losses(self) -> Curve:
        """Training loss."""
        return _curve([row for row in self.metrics if "split" not in row], "loss", "training loss")

    @functools.cached_property
    def evaluations(self) -> Curve:
        """The metric at every evaluation of the split that was evaluated first."""
        rows = [row for row in self.metrics if "metric" in row]
        rows = [row for row in rows if row["split"] == rows[0]["split"]]
        curve = _curve(rows, "metric", rows[0]["metric_name"].replace("_", " ") if rows else "metric")
        losses = self.losses
        if not len(losses):
            return curve
        # Rows of evaluations have no share: it is that of the last row of losses up to their step.
        at = np.maximum(np.searchsorted(losses.step, curve.step, side="right") - 1, 0)
        return replace(curve, share=losses.share[at])

    @property
    def last_step(self) -> int:
        """The last recorded step."""
        steps = [row["step"] for row in self.metrics[-1:]]
        if self.spectra is not None and len(self.spectra.events):
            steps.append(int(self.spectra.events["t"].max()))
        return max(steps, default=0)

    def close(self) -> None:
        """Close the record's files."""
        if "spectra" in self.__dict__ and self.spectra is not None:
            self.spectra.close()


def find_runs(paths: Iterable[Path | str]) -> list[Run]:
    """The runs of folders, two in one of ``oialr compare``; names are the folders', longer where two are equal.

    Raises :class:`DataError` if a folder holds no run, or tasks or models differ, which no figure can compare.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        sides = [path / "dense", path / "oialr"]
        compared = not RunFolder(path).holds_run and all(RunFolder(side).holds_run for side in sides)
        found += sides if compared else [path]
    runs = [Run(path) for path in found]
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = f"{run.folder.path.resolve().parent.name}/{run.name}"
    for section in ("task", "model"):
        settings = {run.name: run.config.get(section) or {} for run in runs}
        chosen = {name: each["class_path"] for name, each in settings.items() if "class_path" in each}
        if len(set(chosen.values())) > 1:
            listed = ", ".join(f"{name} {choice}" for name, choice in chosen.items())
            raise DataError(f"the runs have different {section}s: {listed}. Make a report for each.")
    return runs


def dense_of(runs: Iterable[Run]) -> Run | None:
    """The first dense run."""
    return next((run for run in runs if run.dense), None)


# What ratios_to_dense compares, and where a run's summary has it.
COSTS = {
    "training time": "wall_s",
    "time of a step": "step_s",
    "peak memory": "peak_memory_gib",
    "trained parameters": "trainable_params",
}


def ratios_to_dense(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Each of :data:`COSTS` of every other run over the dense run's.

    Raises :class:`DataError` unless there are a dense and another run, and all have ended.
    """
    dense = dense_of(runs)
    others = [run for run in runs if run is not dense]
    if dense is None or not others:
        names = ", ".join(run.name for run in runs)
        raise DataError(
            f"runs are {names}; one must be dense and one not. Name the folder of oialr compare, or a run "
            "of the same recipe with --oialr null."
        )

    def costs(run: Run) -> dict[str, float]:
        if not run.summary:
            raise DataError(f"{run.folder.path} has no summary.json: the run has not ended. Let it end.")
        numbers = {**run.summary, "step_s": run.summary["wall_s"] / max(1, run.summary["steps"])}
        return {label: float(numbers[key]) for label, key in COSTS.items()}

    base = costs(dense)
    return {run.name: {label: value / base[label] for label, value in costs(run).items()} for run in others}


# What a run costs, and where its summary has it; energy is added up from its metrics.
PRICES = {
    "training time (s)": "wall_s",
    "peak memory (GiB)": "peak_memory_gib",
    "trained parameters": "trainable_params",
}
ENERGY = "energy (kJ)"


def price_of(run: Run) -> dict[str, float]:
    """What a finished run cost; without the energy where a part of it was not measured."""
    prices = {label: float(run.summary[key]) for label, key in PRICES.items()}
    joules = [row.get("energy_J") for row in run.metrics if "split" not in row]
    if joules and None not in joules:
        prices[ENERGY] = sum(cast(list[float], joules)) / 1000
    return prices


def pareto_front(prices: Sequence[float], values: Sequence[float], *, higher_is_better: bool) -> list[int]:
    """Which points no other one beats: indices by rising price; of equal points the first.

    >>> pareto_front([3, 1, 2, 2], [0.9, 0.7, 0.6, 0.8], higher_is_better=True)
    [1, 3, 0]
    """
    sign = 1 if higher_is_better else -1
    front: list[int] = []
    for i in sorted(range(len(prices)), key=lambda i: (prices[i], -sign * values[i], i)):
        if not front or sign * values[i] > sign * values[front[-1]]:
            front.append(i)
    return front


def pareto_fronts(runs: Sequence[Run]) -> dict[str, Any]:
    """Metric and price of every finished run, and for each price the runs that no other one beats in both.

    Runs that were judged by another metric than the first finished one are left out. Empty with fewer than two runs.
    """
    ended = [run for run in runs if run.summary]
    ended = [run for run in ended if run.summary["metric_name"] == ended[0].summary["metric_name"]]
    if len(ended) < 2:
        return {}
    name, prices = ended[0].summary["metric_name"], [price_of(run) for run in ended]
    known = [label for label in (*PRICES, ENERGY) if all(label in each for each in prices)]
    values = [float(run.summary["metric"]) for run in ended]
    higher = name.endswith("accuracy")
    fronts = {label: pareto_front([each[label] for each in prices], values, higher_is_better=higher) for label in known}
    return {
        "metric": name.replace("_", " "),
        "runs": [run.name for run in ended],
        "values": values,
        "prices": {label: [each[label] for each in prices] for label in known},
        "fronts": fronts,
    }


def step_seconds(run: Run) -> tuple[Numbers, Numbers]:
    """Steps in the middle between two rows of losses, and seconds a step took there."""
    curve = run.losses
    steps, seconds = np.diff(curve.step), np.diff(curve.wall_s)
    fine = (steps > 0) & (seconds >= 0)
    middle = (curve.step[1:] + curve.step[:-1])[fine] / 2
    return middle, seconds[fine] / steps[fine]


def conversions(layers: Iterable[Layer]) -> list[int]:
    """Steps at which layers were converted, ascending, each once."""
    found = (layer.t[np.array(layer.kinds) == "conversion"] for layer in layers if len(layer))
    return sorted({int(step) for steps in found for step in steps})


def share_of_k(run: Spectra, last_step: int | None = None) -> tuple[NDArray[np.int64], Numbers]:
    """r / k between events: edges (0, the steps of all events, the end), and shares [layers, edges - 1].

    A share is 1 before a layer's conversion. The end is ``last_step``, or a little after the last event.
    """
    steps = np.unique(run.events["t"])
    end = int(steps[-1]) if len(steps) else 0
    after = last_step if last_step and last_step > end else end + max(1, round(0.03 * end))
    edges = np.unique(np.concatenate([[0], steps, [after]])).astype(np.int64)
    shares = np.ones((len(run), len(edges) - 1))
    for row, layer in enumerate(run.values()):
        # A column shows the last event at or before its left edge.
        last = np.searchsorted(layer.t, edges[:-1], side="right") - 1
        shares[row, last >= 0] = layer.r[last[last >= 0]] / layer.k
    return edges, shares


def spread(count: int, most: int) -> NDArray[np.int64]:
    """At most ``most`` of ``count`` indices, equally far apart, with the first and the last."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def settling_steps(run: Spectra, threshold: float) -> dict[str, float]:
    """From which step on each layer's stability stays at or above a threshold; infinite if it does not.

    Layers without a measurement are left out.
    """
    found = {}
    for name, layer in run.items():
        known = np.isfinite(layer.stability)
        steps, below = layer.t[known], layer.stability[known] < threshold
        if len(steps):
            last = int(np.flatnonzero(below)[-1]) + 1 if below.any() else 0
            found[name] = float(steps[last]) if last < len(steps) else float("inf")
    return found
