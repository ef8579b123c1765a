"""What a search found: a table of all trials, the best one's settings as a recipe, the Pareto front as a plot."""

from __future__ import annotations

import csv
import io
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_oialr.record.files import draft_of, write_atomically
from hpc_oialr.search.runs import TrialRuns
from hpc_oialr.search.space import as_arguments
from hpc_oialr.search.study import ERROR, OWN, best
from hpc_oialr.train.load_config import load_config

if TYPE_CHECKING:
    from optuna import Study

Values = tuple[float, ...]


@dataclass(frozen=True)
class TrialRow:
    """One trial."""

    number: int
    state: str  # in lower case, e.g. "complete", "pruned", "fail", "running"
    own: bool  # whether it is the recipe itself
    best: bool  # the best one, or on the Pareto front
    values: Values | None  # one for each objective; of complete trials
    settings: Mapping[str, Any]  # what is searched; none for the recipe itself where the space lacks its values
    test_metric: float | None  # on test data, by which nothing was chosen; of complete trials
    error: str

    @property
    def name(self) -> str:
        """How it is called in tables."""
        return f"{self.number}, the recipe" if self.own else str(self.number)


@dataclass(frozen=True)
class Findings:
    """All trials of a search."""

    folder: Path
    recipe: str
    objectives: tuple[str, ...]
    directions: tuple[str, ...]
    metric_name: str
    settings: tuple[str, ...]  # of every trial, as on the command line
    rows: tuple[TrialRow, ...]

    @property
    def best(self) -> TrialRow | None:
        """The best trial by the first objective; None if none is complete."""
        front = [row for row in self.rows if row.best and row.values]
        sign = 1 if self.directions[0] == "minimize" else -1
        return min(front, key=lambda row: (sign * (row.values or (0.0,))[0], row.number), default=None)

    @property
    def own(self) -> TrialRow | None:
        """The recipe itself; None if it is not complete."""
        return next((row for row in self.rows if row.own and row.values), None)

    def arguments(self, row: TrialRow) -> list[str]:
        """All settings of a trial, as on the command line."""
        return [*self.settings, *([] if row.own else as_arguments(row.settings))]

    def command(self, row: TrialRow) -> str:
        """The command that trains with a trial's settings."""
        return shlex.join(["oialr", "train", self.recipe, *self.arguments(row)])

    def verdict(self) -> str:
        """Whether the best trial is better than the recipe, in a sentence."""
        found, own = self.best, self.own
        if found is None or found.values is None:
            return "no trial came to its end"
        name = self.objectives[0]
        name = f"validation {self.metric_name.replace('_', ' ')}" if name == "metric" else name
        shown = f"{name} {found.values[0]:.5g}"
        if own is None or own.values is None:
            return f"trial {found.number} is best, {shown}; the recipe itself has not come to its end"
        if own is found or found.values[0] == own.values[0]:
            return f"no trial beats the recipe itself, {shown}"
        by = f"trial {found.number} beats the recipe itself: {shown} against {own.values[0]:.5g}"
        if found.test_metric is None or own.test_metric is None or self.objectives[0] != "metric":
            return by
        return f"{by}; on test data, by which nothing was chosen, {found.test_metric:.5g} against {own.test_metric:.5g}"

    def write(self) -> list[Path]:
        """Write ``trials.csv``, and ``best.yaml``, a recipe, if a trial came to its end; their paths."""
        written = [self.folder / "trials.csv"]
        write_atomically(written[0], self._csv())
        if (found := self.best) is not None:
            written.append(self.folder / "best.yaml")
            write_atomically(written[1], load_config(self.recipe, self.arguments(found)).text)
        return written

    def _csv(self) -> str:
        names = list(dict.fromkeys(name for row in self.rows for name in row.settings))
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["trial", "state", "recipe itself", "best", *self.objectives, "test_metric", *names, "error"])
        for row in self.rows:
            values = row.values or ("",) * len(self.objectives)
            own = (row.settings.get(name, "") for name in names)
            test = "" if row.test_metric is None else row.test_metric
            table.writerow([row.number, row.state, row.own, row.best, *values, test, *own, row.error])
        return text.getvalue()

    def plot(self, path: Path) -> None:
        """The Pareto front: the first objective against each other one; needs matplotlib."""
        from matplotlib.figure import Figure

        others = range(1, len(self.objectives))
        figure = Figure(figsize=(5.2 * len(others), 4.2), layout="constrained")
        names = [self.metric_name if name == "metric" else name for name in self.objectives]
        for panel, axes in zip(others, figure.subplots(1, len(others), squeeze=False)[0], strict=True):
            for chosen, colour, label in ((False, "0.7", "other trials"), (True, "#D55E00", "Pareto front")):
                points = sorted((r.values[panel], r.values[0]) for r in self.rows if r.values and r.best == chosen)
                if points:
                    axes.plot(*zip(*points, strict=True), "o", color=colour, label=label)
            if (own := self.own) is not None and own.values is not None:
                ring = {"mfc": "none", "mec": "#0072B2", "ms": 11, "label": "the recipe itself"}
                axes.plot(own.values[panel], own.values[0], "o", **ring)
            axes.set(xlabel=names[panel].replace("_", " "), ylabel=f"validation {names[0].replace('_', ' ')}")
            axes.legend(frameon=False)
        with draft_of(path) as draft:
            figure.savefig(draft, dpi=160, format=path.suffix[1:])


def findings(study: Study, runs: TrialRuns, objectives: Sequence[str], metric_name: str) -> Findings:
    """What a study holds now."""
    chosen = {trial.number for trial in best(study)}
    rows = []
    for trial in study.get_trials(deepcopy=False):
        run, values = runs.run(trial.number), trial.values
        summary = run.read_summary() if values is not None and run.finished else {}
        rows.append(
            TrialRow(
                number=trial.number,
                state=trial.state.name.lower(),
                own=OWN in trial.user_attrs,
                best=trial.number in chosen,
                values=None if values is None or trial.state.name != "COMPLETE" else tuple(values),
                settings=dict(trial.params),
                test_metric=_test_metric(summary, metric_name),
                error=trial.user_attrs.get(ERROR, ""),
            )
        )
    return Findings(
        folder=runs.folder,
        recipe=runs.recipe,
        objectives=tuple(objectives),
        directions=tuple(each.name.lower() for each in study.directions),
        metric_name=metric_name,
        settings=tuple(runs.settings),
        rows=tuple(rows),
    )


def _test_metric(summary: Mapping[str, Any], metric_name: str) -> float | None:
    found = summary.get("metric") if str(summary.get("metric_name")).startswith("test_") else None
    return (summary.get("test_at_best") or {}).get(metric_name, found)
