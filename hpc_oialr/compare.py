"""A recipe and its dense baseline: metric against wall time for both."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_oialr.distributed import launch_info
from hpc_oialr.errors import OIALRError
from hpc_oialr.exit_codes import STOPPED
from hpc_oialr.outputs import require_absent
from hpc_oialr.record.files import write_atomically
from hpc_oialr.record.owner import Claim
from hpc_oialr.record.run_folder import RunFolder
from hpc_oialr.report.runs import Curve, Run
from hpc_oialr.train.load_config import LoadedConfig, dense_twin
from hpc_oialr.train.run import joined, on_main, owned, train_or_resume
from hpc_oialr.train.timing import StopRequest


@dataclass(frozen=True)
class Comparison:
    """Two finished runs."""

    folder: Path  # of both run folders and compare.json
    result: dict[str, Any]  # content of compare.json
    curves: Mapping[str, Curve]  # the metric of each side at every evaluation


def compare(
    loaded: LoadedConfig,
    folder: Path,
    *,
    own: bool,
    stop: StopRequest | None = None,
    claim: Claim | None = None,
) -> Comparison | None:
    """Train the dense baseline, then the recipe, and compare them.

    None if stopped on request: the same call continues. Each side trains in a fresh process, so that neither uses memory
    or caches of the other; under a launcher both train in its processes, one after the other. ``own``: the dense baseline
    uses the recipe's ``dense`` settings; otherwise the same ones, so the same steps. Raises OIALRError if the recipe
    trains dense, the folder has a comparison already, or a run fails.
    """
    if loaded.config.oialr is None:
        raise OIALRError("oialr is null: there is nothing to compare a dense run with. Leave out --oialr null.")
    sides = {"dense": dense_twin(loaded, own=own), "oialr": loaded}
    stop, claim = stop or StopRequest(), claim or Claim("oialr compare")
    if launch_info().size > 1:
        with joined(None, loaded) as world, owned(RunFolder(folder), world, claim):
            on_main(world, lambda: _begin(sides, folder))
            done = all(
                train_or_resume(each, folder / side, world=world, stop=stop, claim=claim).summary is not None
                for side, each in sides.items()
            )
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
    known = {side: path.is_file() and path.read_text("utf-8") == sides[side].text for side, path in recipes.items()}
    names = [name for side in sides if not known[side] for name in (f"{side}.yaml", side)]
    require_absent(folder, names if any(known.values()) else [*names, "compare.png"], "this comparison")
    folder.mkdir(parents=True, exist_ok=True)
    for side, path in recipes.items():
        write_atomically(path, sides[side].text)


def _collect(folder: Path) -> Comparison:
    """Compares two finished runs; rank 0 writes ``compare.json``."""
    runs = {side: Run(folder / side) for side in ("dense", "oialr")}
    dense, oialr = (run.summary for run in runs.values())
    curves = {side: run.evaluations for side, run in runs.items()}
    keys = {"wall": "wall_s", "peak_memory": "peak_memory_gib", "trainable": "trainable_params"}
    result = {
        "dense": dense,
        "oialr": oialr,
        "ratios": {name: oialr[key] / dense[key] for name, key in keys.items()},
        "metric_difference": oialr["metric"] - dense["metric"],
        "dense_metric_at_oialr_wall": curves["dense"].at(oialr["wall_s"]),
    }
    if launch_info().rank == 0:
        write_atomically(folder / "compare.json", json.dumps(result, indent=2))
    return Comparison(folder, result, curves)


def plot(comparison: Comparison, path: Path) -> None:
    """Metric against wall time for both runs; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for side, colour, marker in (("dense", "#0072B2", "o"), ("oialr", "#D55E00", "s")):
        curve = comparison.curves[side]
        share = comparison.result[side]["trainable_params"] / comparison.result["dense"]["trainable_params"]
        label = "dense" if side == "dense" else f"OIALR, {share:.1%} of the parameters trained at the end"
        axes.plot(curve.wall_s, curve.value, color=colour, marker=marker, markersize=4, label=label)
    axes.axvline(comparison.result["oialr"]["wall_s"], color="0.6", linewidth=0.8, linestyle="--")
    metric = comparison.result["dense"]["metric_name"].replace("_", " ")
    axes.set(xlabel="training time (s)", ylabel=metric)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=160)


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
    """A run's exit code; passes on signals that only this process receives (Ctrl-C reaches both)."""
    signalled = False
    with run:
        while True:
            try:
                return run.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                asker = stop.asked()
            if asker and asker != "Ctrl-C" and not signalled:
                run.terminate()
                signalled = True
