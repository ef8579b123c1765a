"""The runs of a search's trials: submitted as jobs, watched through their folders, ended early."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpc_oialr.distributed.environment import usable_cores
from hpc_oialr.errors import DataError, OIALRError
from hpc_oialr.launch.job_file import last_error, read_job
from hpc_oialr.launch.jobs import cancel, states_of
from hpc_oialr.launch.request import Request
from hpc_oialr.launch.slurm import Slurm
from hpc_oialr.launch.submission import Submission
from hpc_oialr.record.metrics import read_metrics
from hpc_oialr.record.run_folder import RunFolder
from hpc_oialr.search.space import as_arguments

# Between two questions to Slurm about the jobs (s); the end of a run is seen in its folder before.
_ASK_S = 10.0
_THREADS = "OMP_NUM_THREADS"


@dataclass
class TrialRuns:
    """Starts and watches the runs of trials, each in ``folder/trial_0007``.

    Parameters
    ----------
    recipe, settings
        Of every trial; its own settings come on top.
    request
        Of every trial's job.
    parallel
        How many run at a time, which share this machine's cores and GPUs with the executor "local".
    """

    recipe: str
    settings: Sequence[str]
    request: Request
    folder: Path
    parallel: int
    _slurm: Slurm = field(default_factory=Slurm)
    _asked: float = -_ASK_S
    _over: dict[int, bool] = field(default_factory=dict)

    def run(self, number: int) -> RunFolder:
        """The folder of a trial's run."""
        return RunFolder(self.folder / f"trial_{number:04d}")

    def submission(self, number: int, values: Mapping[str, Any], slot: int = 0) -> Submission:
        """A trial's run, checked; raises :class:`ConfigError` if its settings do not fit each other."""
        request = replace(self.request, folder=self.run(number).path)
        if request.executor == "local" and request.gpus:
            request = replace(request, visible_gpus=range(slot * request.gpus, (slot + 1) * request.gpus))
        return Submission.of(self.recipe, [*self.settings, *as_arguments(values)], request)

    def start(self, submission: Submission) -> None:
        """Submit a run, which resumes if it has a checkpoint; :class:`OIALRError` if Slurm refuses the job."""
        threads = max(1, usable_cores() // (self.parallel * self.request.processes))
        with _beside_others(threads) if self.request.executor == "local" else nullcontext():
            submission.submit()
        self._over.clear()

    def alive(self, number: int) -> bool:
        """Whether a job works on a trial, or waits to; asked now."""
        try:
            job = read_job(self.run(number))
        except DataError:
            return False
        return not states_of([job], self._slurm)[0].over

    def over(self, numbers: Iterable[int]) -> dict[int, bool]:
        """Whether the jobs of trials are over; asked now and then."""
        wanted = list(numbers)
        local = self.request.executor == "local"
        if local or time.monotonic() - self._asked >= _ASK_S or not set(wanted) <= set(self._over):
            jobs = [read_job(self.run(number)) for number in wanted]
            states = states_of(jobs, self._slurm)
            self._over = {number: state.over for number, state in zip(wanted, states, strict=True)}
            self._asked = time.monotonic()
        return self._over

    def metrics(self, number: int) -> list[float]:
        """The metric at each evaluation on validation data so far; NaN where it is not finite.

        Raises :class:`OIALRError` if the run evaluates on test data.
        """
        path = self.run(number).metrics
        rows = [row for row in read_metrics(path) if "split" in row] if path.exists() else []
        found = [row["metric"] for row in rows if row["split"] == "validation"]
        if rows and not found:
            raise OIALRError(
                f"{self.run(number).path} has no validation data, and trials are not to be chosen by test data. Set "
                "some aside, e.g. --data.validation 5000."
            )
        return [float("nan") if value is None else float(value) for value in found]

    def error(self, number: int) -> str:
        """Why a run has ended before its end."""
        return last_error(read_job(self.run(number))) or "it ended without a word"

    def end(self, number: int) -> None:
        """End a trial's job, if it is still there; with a checkpoint."""
        with suppress(OIALRError):
            cancel(str(self.run(number).path))


@contextmanager
def _beside_others(threads: int) -> Iterator[None]:
    """How a run on this machine starts: with its share of the cores, and without Ctrl-C, which is the search's.

    The terminal sends Ctrl-C to all processes; the search then tells the runs to stop, by TERM.
    """
    given, before = _THREADS in os.environ, signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ.setdefault(_THREADS, str(threads))
    try:
        yield
    finally:
        if not given:
            del os.environ[_THREADS]
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
