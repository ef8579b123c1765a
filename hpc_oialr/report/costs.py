"""What runs cost, relative to a dense one."""

from __future__ import annotations

from collections.abc import Sequence

from hpc_oialr.errors import DataError
from hpc_oialr.report.runs import Run, dense_of

FIGURES = (
    ("training time", "wall_s"),
    ("time of a step", "step_s"),
    ("peak memory", "peak_memory_gib"),
    ("trained parameters", "trainable_params"),
)


def ratios_to_dense(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """For every run but the dense one, each of :data:`FIGURES` over the dense run's.

    Raises
    ------
    DataError
        Without a dense run or another one, or if one has not ended.
    """
    dense = dense_of(runs)
    others = [run for run in runs if run is not dense]
    if dense is None or not others:
        names = ", ".join(run.name for run in runs)
        raise DataError(
            f"runs are {names}; one must be dense and one not. Name the folder of oialr compare, or a run "
            "of the same recipe with --oialr null."
        )
    base = _costs(dense)
    return {run.name: {label: value / base[label] for label, value in _costs(run).items()} for run in others}


def _costs(run: Run) -> dict[str, float]:
    if not run.summary:
        raise DataError(f"{run.folder.path} has no summary.json: the run has not ended. Let it end.")
    numbers = {**run.summary, "step_s": run.summary["wall_s"] / max(1, run.summary["steps"])}
    return {label: float(numbers[key]) for label, key in FIGURES}
