"""A recipe and its dense baseline: metric against wall time for both."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpc_oialr.distributed import launch_info
from hpc_oialr.errors import OIALRError
from hpc_oialr.exit_codes import STOPPED
from hpc_oialr.outputs import require_absent
from hpc_oialr.record.files import write_atomically
from hpc_oialr.record.metrics import read_metrics
from hpc_oialr.record.owner import Claim
from hpc_oialr.record.run_folder import RunFolder
from hpc_oialr.train.load_config import LoadedConfig, dense_twin
from hpc_oialr.train.run import joined, on_main, owned, train_or_resume
from hpc_oialr.train.timing import StopRequest

SIDES = ("dense", "oialr")
_POLL_S = 0.2

Curve = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Comparison:
    """Two finished runs."""

    folder: Path  # of both run folders and compare.json
    result: dict[str, Any]  # content of compare.json
    curves: Mapping[str, Curve]  # of each side, (training seconds, metric) of every evaluation


def compare(
    loaded: LoadedConfig,
    folder: Path,
    *,
    own: bool,
    stop: StopRequest | None = None,
    claim: Claim | None = None,
) -> Comparison | None:
    """Train the dense baseline, then the recipe, and compare them; None if stopped on request, to be called again.

    Each runs in a fresh process, so that neither uses memory or caches of the other; started as several processes,
    both run in them one after the other. ``own``: the dense baseline takes the recipe's ``dense`` settings; otherwise the
    same ones, so the same steps. Raises OIALRError if the recipe trains dense anyway, the folder holds a comparison,
    or a run fails.
    """
    if loaded.config.oialr is None:
        raise OIALRError(
            "oialr is null: there is nothing to compare a dense run with. Leave out --oialr null."
        )
    sides = {"dense": dense_twin(loaded, own=own), "oialr": loaded}
    stop, claim = stop or StopRequest(), claim or Claim("oialr compare")
    if launch_info().size > 1:
        done = _run_here(sides, folder, stop, claim)
    else:
        with closing(claim.take(RunFolder(folder))):
            _begin(sides, folder)
            done = _run_fresh(sides, folder, stop)
    return _collect(folder) if done else None


def _begin(sides: Mapping[str, LoadedConfig], folder: Path) -> None:
    """Write both sides' settings, or accept a stopped comparison of the same ones; refuse any other content."""
    if (folder / "compare.json").exists():
        raise OIALRError(f"{folder} holds a comparison already. Take another --out.")
    if RunFolder(folder).holds_run or RunFolder(folder).job.exists():
        raise OIALRError(f"{folder} holds a run, and a comparison has a folder of two. Take another --out.")
    recipes = {side: folder / f"{side}.yaml" for side in sides}
    known = {
        side: path.is_file() and path.read_text("utf-8") == sides[side].text for side, path in recipes.items()
    }
    names = [name for side in sides if not known[side] for name in (f"{side}.yaml", side)]
    require_absent(folder, names if any(known.values()) else [*names, "compare.png"], "this comparison")
    folder.mkdir(parents=True, exist_ok=True)
    for side, path in recipes.items():
        write_atomically(path, sides[side].text)


def _collect(folder: Path) -> Comparison:
    """The comparison of two finished runs; writes ``compare.json``."""
    dense, oialr = (json.loads((folder / side / "summary.json").read_text("utf-8")) for side in SIDES)
    curves = {side: _evaluation_curve(folder / side / "metrics.jsonl") for side in SIDES}
    keys = {"wall": "wall_s", "peak_memory": "peak_memory_gib", "trainable": "trainable_params"}
    result = {
        "dense": dense,
        "oialr": oialr,
        "ratios": {name: oialr[key] / dense[key] for name, key in keys.items()},
        "metric_difference": oialr["metric"] - dense["metric"],
        "dense_metric_at_oialr_wall": _metric_at(curves["dense"], oialr["wall_s"]),
    }
    if launch_info().rank == 0:
        write_atomically(folder / "compare.json", json.dumps(result, indent=2))
    return Comparison(folder, result, curves)


def _metric_at(curve: Curve, wall_s: float) -> float | None:
    """A curve's metric after ``wall_s`` seconds, interpolated; None before the first evaluation.

    Examples
    --------
    >>> [_metric_at([(10.0, 0.5), (20.0, 0.75)], seconds) for seconds in (9.0, 14.0, 99.0)]
    [None, 0.6, 0.75]
    """
    if not curve or wall_s < curve[0][0]:
        return None
    seconds, metrics = zip(*curve, strict=True)
    return float(np.interp(wall_s, seconds, metrics))


def _evaluation_curve(metrics: Path) -> list[tuple[float, float]]:
    """(training seconds, metric) of every evaluation during a run, in order."""
    found = [row for row in read_metrics(metrics) if "metric" in row]
    return [(row["wall_s"], row["metric"]) for row in found if row["split"] == found[0]["split"]]


def plot(comparison: Comparison, path: Path) -> None:
    """Metric against wall time for both runs; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for side, colour, marker in (("dense", "#0072B2", "o"), ("oialr", "#D55E00", "s")):
        seconds, metric = zip(*comparison.curves[side], strict=True)
        share = comparison.result[side]["trainable_params"] / comparison.result["dense"]["trainable_params"]
        label = "dense" if side == "dense" else f"OIALR, {share:.1%} of the parameters trained at the end"
        axes.plot(seconds, metric, color=colour, marker=marker, markersize=4, label=label)
    axes.axvline(comparison.result["oialr"]["wall_s"], color="0.6", linewidth=0.8, linestyle="--")
    axes.set_xlabel("training time (s)")
    axes.set_ylabel(comparison.result["dense"]["metric_name"].replace("_", " "))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)


def _run_here(sides: Mapping[str, LoadedConfig], folder: Path, stop: StopRequest, claim: Claim) -> bool:
    """Train both in these processes; False if one was stopped on request."""
    with joined(None, sides["oialr"]) as world, owned(RunFolder(folder), world, claim):
        on_main(world, lambda: _begin(sides, folder))
        return all(
            train_or_resume(loaded, folder / side, world=world, stop=stop, claim=claim).summary is not None
            for side, loaded in sides.items()
        )


def _run_fresh(sides: Mapping[str, LoadedConfig], folder: Path, stop: StopRequest) -> bool:
    """Train each in a process of its own; False if one was stopped on request."""
    for side in sides:
        recipe, out = folder / f"{side}.yaml", folder / side
        command = [sys.executable, "-m", "hpc_oialr", "train", str(recipe), "--out", str(out), "--continue"]
        code = _wait(subprocess.Popen(command), stop)
        if code == STOPPED:
            return False
        if code:
            raise OIALRError(f"the {side} run in {out} failed with exit code {code}; its log says why.")
    return True


def _wait(run: subprocess.Popen[bytes], stop: StopRequest) -> int:
    """A run's exit code; signals that reach this process alone are passed on, which Ctrl-C needs not."""
    signalled = False
    with run:
        while True:
            try:
                return run.wait(timeout=_POLL_S)
            except subprocess.TimeoutExpired:
                asker = stop.asked()
            if asker and asker != "Ctrl-C" and not signalled:
                run.terminate()
                signalled = True
