"""The search itself: asks for trials, keeps so many running, stops poor ones early; goes on after a kill."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_oialr.errors import ConfigError, OIALRError
from hpc_oialr.record.files import to_json, write_atomically
from hpc_oialr.record.owner import Claim
from hpc_oialr.record.run_folder import RunFolder
from hpc_oialr.search.runs import TrialRuns
from hpc_oialr.search.space import Space
from hpc_oialr.search.study import (
    ERROR,
    JOURNAL,
    OWN,
    StudySettings,
    begun,
    enqueue_own,
    open_study,
    require_optuna,
    running,
    suggest,
)
from hpc_oialr.system_errors import read_json
from hpc_oialr.train.load_config import LoadedConfig

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import Trial

    from hpc_oialr.launch.submission import Submission

_SETTINGS = "search.json"
_SLOT = "slot"


@dataclass
class Search:
    """A search in its folder.

    Parameters
    ----------
    loaded
        The recipe with the settings of every trial, by ``check_space``.
    trials
        How many in all, those of earlier calls, pruned and failed ones included.
    tell
        Called with a line for everything that happens.
    poll_s
        Between two looks at the runs (s).
    """

    loaded: LoadedConfig
    space: Space
    settings: StudySettings
    runs: TrialRuns
    trials: int
    tell: Callable[[str], None] = lambda _: None
    poll_s: float = 1.0
    _active: dict[int, Trial] = field(default_factory=dict)
    _waiting: list[tuple[Trial, Submission]] = field(default_factory=list)  # Slurm has refused their jobs so far
    _taken_up: set[int] = field(default_factory=set)  # running trials that an earlier call has submitted

    @property
    def folder(self) -> Path:
        """Where everything is."""
        return self.runs.folder

    def run(self, *, stopped: Callable[[], str], claim: Claim) -> Study | None:
        """Go on until all trials are over; None if stopped on request: the same call continues.

        Raises FolderInUseError if another search works in the folder; OIALRError if it holds another one, if the recipe
        itself fails, or if Slurm takes no job.
        """
        require_optuna()
        with closing(claim.take(RunFolder(self.folder))):
            self._begin()
            study = open_study(self.folder, self.settings)
            enqueue_own(study, self.space.own_values(self.loaded))
            try:
                for trial in running(study):
                    self._take_up(trial)
                while not (reason := stopped()):
                    self._collect(study)
                    self._fill(study)
                    if not (self._active or self._waiting):
                        return study
                    time.sleep(self.poll_s)
            except OIALRError:
                # Nobody would watch them; they resume when the search continues.
                self._end_all()
                raise
            self._leave(reason)
        return None

    def _begin(self) -> None:
        """Write what is searched, or accept an earlier call of the same search; refuse any other content."""
        now = {
            "recipe": self.runs.recipe,
            "objectives": list(self.settings.objectives),
            "config": self.loaded.tree,
            **self.space.tree,
        }
        now, path = json.loads(to_json(now)), self.folder / _SETTINGS
        if not path.exists():
            if RunFolder(self.folder).holds_run or (self.folder / JOURNAL).exists():
                raise OIALRError(f"{self.folder} holds something else than this search. Take another --out.")
            write_atomically(path, to_json(now, indent=1) + "\n")
            return
        then = read_json(path)
        if other := [name for name in now if name != "recipe" and then.get(name) != now[name]]:
            raise OIALRError(
                f"{self.folder} holds a search with another {other[0]}; see {path}. Repeat that search's command, or "
                "take another --out."
            )

    def _take_up(self, trial: Trial) -> None:
        """A trial of a search that was stopped or killed: goes on, or runs again from its last checkpoint."""
        number = trial.number
        if self.runs.run(number).finished or self.runs.alive(number):
            self._active[number] = trial
            self._taken_up.add(number)
            self.tell(f"trial {number}: taken up again")
        else:
            again = "runs again from its last checkpoint" if self.runs.run(number).holds_run else "runs anew"
            self.tell(f"trial {number}: {again}")
            self._submit(trial)

    def _fill(self, study: Study) -> None:
        """Start trials while there is room."""
        waiting, self._waiting = self._waiting, []
        for trial, submission in waiting:
            self._start(trial, submission)
        while len(self._active) + len(self._waiting) < self.runs.parallel and begun(study) < self.trials:
            self._submit(study.ask())

    def _submit(self, trial: Trial) -> None:
        values, used = suggest(trial, self.space), {each.user_attrs.get(_SLOT) for each in self._active.values()}
        slot = trial.user_attrs.get(_SLOT)
        if slot is None:
            slot = next(i for i in range(self.runs.parallel + 1) if i not in used)
            trial.set_user_attr(_SLOT, slot)
        try:
            submission = self.runs.submission(trial.number, values, slot)
        except ConfigError as error:
            self._fail(trial, str(error))
            return
        said = "the recipe itself" if OWN in trial.user_attrs else _text(values)
        self.tell(f"trial {trial.number}: {said}")
        self._start(trial, submission)

    def _start(self, trial: Trial, submission: Submission) -> None:
        """Submit a run; if Slurm refuses while others run, e.g. beyond a limit of jobs, it is tried again."""
        try:
            self.runs.start(submission)
        except OIALRError as error:
            if not self._active:
                raise
            if not self._waiting:
                self.tell(f"trial {trial.number} waits: {error}")
            self._waiting.append((trial, submission))
        else:
            self._active[trial.number] = trial

    def _collect(self, study: Study) -> None:
        """Look at all running trials: report what they measured, tell the study of those that are over."""
        over = self.runs.over(self._active)
        for number, trial in list(self._active.items()):
            # Asked after whether the job is over, so that a summary written in between counts.
            finished, metrics = self.runs.run(number).finished, self.runs.metrics(number)
            alone = len(self.settings.objectives) == 1  # Optuna stops trials early by one objective only
            if alone:
                known = study.get_trials(deepcopy=False)[number].intermediate_values
                for index in range(len(known), len(metrics)):
                    trial.report(metrics[index], index)
            if finished:
                self._complete(study, trial, metrics)
            elif over[number] and number in self._taken_up:
                # It was being stopped, together with the earlier call.
                self._taken_up.discard(number)
                del self._active[number]
                self._take_up(trial)
            elif over[number]:
                self._fail(trial, self.runs.error(number))
            elif alone and OWN not in trial.user_attrs and trial.should_prune():
                self.runs.end(number)
                self._tell(trial, "PRUNED", f"stopped early, {self._shown(metrics[-1])}")

    def _complete(self, study: Study, trial: Trial, metrics: Sequence[float]) -> None:
        summary = self.runs.run(trial.number).read_summary()
        # The metric by which such a run is judged: that of its best evaluation where its test metrics are of it, too.
        at_end = summary["best_metric"] if summary.get("test_at_best") else metrics[-1] if metrics else None
        known = {**summary, "metric": at_end}
        values = [known[name] for name in self.settings.objectives]
        if any(value is None or value != value for value in values):
            self._fail(trial, f"{self.settings.objectives} are {values}")
            return
        shown = ", ".join(f"{name} {value:.5g}" for name, value in zip(self.settings.objectives, values, strict=True))
        self._tell(trial, "COMPLETE", shown, values)

    def _fail(self, trial: Trial, reason: str) -> None:
        """Count a trial as failed; raises :class:`OIALRError` if it is the recipe itself."""
        trial.set_user_attr(ERROR, reason)
        self._tell(trial, "FAIL", f"failed: {reason}")
        if OWN in trial.user_attrs:
            raise OIALRError(
                f"the recipe itself fails ({self.runs.run(trial.number).path}): {reason}. Put that right, then the same "
                "command again."
            )

    def _tell(self, trial: Trial, state: str, text: str, values: Sequence[float] | None = None) -> None:
        from optuna.trial import TrialState

        trial.study.tell(trial, values, state=TrialState[state])
        self._active.pop(trial.number, None)
        self.tell(f"trial {trial.number}: {text}")

    def _leave(self, reason: str) -> None:
        """Stopped on request: jobs of Slurm go on, runs on this machine stop with a checkpoint."""
        if self.runs.request.executor == "local":
            self._end_all()
            self.tell(f"stopped by {reason}; running trials stop with a checkpoint")
        else:
            self.tell(f"stopped by {reason}; {len(self._active)} jobs go on, and count when the search continues")

    def _end_all(self) -> None:
        for number in self._active:
            self.runs.end(number)

    def _shown(self, metric: float) -> str:
        return f"{self.loaded.config.task.metric.replace('_', ' ')} {metric:.5g}"


def _text(values: dict[str, Any]) -> str:
    shown = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in values.values())
    return ", ".join(f"{name} {value}" for name, value in zip(values, shown, strict=True))
