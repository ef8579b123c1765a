"""Optuna's study of a search: trials asked, told and kept in a journal on the shared file system."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_oialr.errors import MissingExtraError
from hpc_oialr.search.objectives import OBJECTIVES
from hpc_oialr.search.space import Space

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

JOURNAL = "journal.log"
# A user attribute of the trial that has the recipe's own values; another one holds why a trial failed.
OWN, ERROR = "recipe", "error"
_NAME = "search"


@dataclass(frozen=True)
class StudySettings:
    """What a study depends on beside its space."""

    objectives: Sequence[str]
    higher_is_better: bool  # of the metric
    evaluations: int  # of each trial
    parallel: int
    seed: int
    prune: bool

    @property
    def directions(self) -> list[str]:
        """Optuna's word for each objective."""
        less = {name: not self.higher_is_better if less is None else less for name, less in OBJECTIVES.items()}
        return ["minimize" if less[name] else "maximize" for name in self.objectives]


def require_optuna() -> None:
    """Raise :class:`MissingExtraError` where Optuna is missing; silence its log, which repeats what we say."""
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("optuna", "search", purpose="A search") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def open_study(folder: Path, settings: StudySettings) -> Study:
    """The study in a folder that this process has claimed; a new one if there is none."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    journal = folder / JOURNAL
    # Of a search that was killed while it wrote: the folder is ours, so nobody holds the lock. Behind a torn line
    # Optuna could not read what follows.
    journal.with_name(f"{JOURNAL}.lock").unlink(missing_ok=True)
    if journal.exists():
        os.truncate(journal, journal.read_bytes().rfind(b"\n") + 1)
    storage = JournalStorage(JournalFileBackend(str(journal)))
    study = optuna.create_study(storage=storage, study_name=_NAME, directions=settings.directions, load_if_exists=True)
    # The same seed again would propose the first trials again.
    study.sampler = optuna.samplers.TPESampler(seed=settings.seed + len(study.get_trials(deepcopy=False)))
    pruner: Any = optuna.pruners.NopPruner()
    if settings.prune and len(settings.objectives) == 1:
        # Low-rank training loses a little at its conversion: what is behind in the first third may still win.
        pruner = optuna.pruners.MedianPruner(
            n_startup_trials=max(3, settings.parallel), n_warmup_steps=settings.evaluations // 3
        )
    study.pruner = pruner
    return study


def enqueue_own(study: Study, own: dict[str, Any] | None) -> None:
    """Let the recipe itself be the next trial, unless it has been tried.

    ``own``: its values; None if it has others than the space.
    """
    from optuna.trial import TrialState

    if not any(
        OWN in trial.user_attrs and trial.state != TrialState.FAIL for trial in study.get_trials(deepcopy=False)
    ):
        study.enqueue_trial(own or {}, user_attrs={OWN: own is not None})


def suggest(trial: Trial, space: Space) -> dict[str, Any]:
    """The trial's values, the same ones again if it has some; none for the recipe itself."""
    values = {} if trial.user_attrs.get(OWN) is False else {n: _value(trial, n, space) for n in space.dimensions}
    return {} if OWN in trial.user_attrs else values


def _value(trial: Trial, name: str, space: Space) -> Any:
    each = space.dimensions[name]
    if each.kind == "choice":
        return trial.suggest_categorical(name, each.values)
    low, high = each.range
    if each.kind == "int":
        return trial.suggest_int(name, int(low), int(high), log=each.log)
    return trial.suggest_float(name, low, high, log=each.log)


def running(study: Study) -> list[Trial]:
    """Trials that were begun and not told the end of."""
    from optuna.trial import Trial, TrialState

    found = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [Trial(study, frozen._trial_id) for frozen in found]


def begun(study: Study) -> int:
    """How many trials were begun."""
    from optuna.trial import TrialState

    return sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))


def best(study: Study) -> list[FrozenTrial]:
    """The best trial, or the Pareto front of several objectives; none while no trial is complete."""
    from optuna.trial import TrialState

    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return []
    # Of equals the first: the recipe, if it is one of them.
    return sorted(study.best_trials, key=lambda trial: trial.number)[: None if len(study.directions) > 1 else 1]
