"""What Slurm says of jobs: squeue for those it remembers, sacct for those before, where there is accounting."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from hpc_oialr.launch.programs import NoAnswerError, ask

log = logging.getLogger(__name__)

# Name and width of squeue's columns.
_COLUMNS = {
    "JobArrayID": 40,
    "State": 20,
    "RestartCnt": 12,
    "StartTime": 24,
    "EndTime": 24,
    "Reason": 60,
}
# Nobody answers; whoever answers knows the job no more; it ended somehow, and its run is not done.
UNKNOWN, FORGOTTEN, ENDED = "UNKNOWN", "FORGOTTEN", "ENDED"
_OVER = {
    FORGOTTEN,
    ENDED,
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
}
_UNKNOWN = {
    "squeue": "Slurm does not answer (squeue: %s): states of jobs are taken from their run folders",
    "sacct": "no accounts of jobs are kept here (sacct: %s): states of those that Slurm has forgotten are taken "
    "from their run folders",
}


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job at this moment.

    Attributes
    ----------
    state
        Slurm's word, e.g. "RUNNING".
    requeues
        How often it was requeued; None if that is not known.
    start, end
        When it started or is expected to; when it ended, or must end.
    reason
        Why it waits.
    """

    state: str
    requeues: int | None = None
    start: datetime | None = None
    end: datetime | None = None
    reason: str = ""

    @property
    def over(self) -> bool:
        """Whether it will not run again."""
        return self.state in _OVER


class Slurm:
    """Answers questions about jobs; says once if there is no accounting.

    Parameters
    ----------
    level
        Of what it says, for ``logging``.

    Attributes
    ----------
    reached
        Whether squeue answered the last question.
    """

    def __init__(self, *, level: int = logging.WARNING) -> None:
        self.reached, self._level = False, level
        self._silent: set[str] = set()

    def states(self, job_ids: Iterable[str]) -> dict[str, JobState]:
        """States by job id, e.g. "12" or "12_0"; those that Slurm does not know are left out."""
        wanted = set(job_ids)
        if not wanted:
            return {}
        found = {job: state for job, state in self._queue().items() if job in wanted}
        rest = sorted(wanted - set(found))
        return {**self._history(rest), **found} if rest and "sacct" not in self._silent else found

    def _queue(self) -> dict[str, JobState]:
        """This user's jobs, those of the last minutes included."""
        columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
        which = ["--noheader", "--array", "--states=all", f"--user={os.geteuid()}"]
        try:
            found = parse_queue(ask(["squeue", *which, f"--Format={columns}"]).stdout)
        except NoAnswerError as error:
            self.say("squeue", _UNKNOWN["squeue"] % error)
            self.reached = False
            return {}
        self.reached = True
        return found

    def _history(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """Jobs that squeue does not know any more."""
        which = ["--noheader", "--parsable2", "--allocations", "--duplicates", f"--jobs={','.join(job_ids)}"]
        try:
            return parse_history(ask(["sacct", *which, "--format=JobID,State,Start,End"]).stdout)
        except NoAnswerError as error:
            self.say("sacct", _UNKNOWN["sacct"] % error)
            return {}

    def say(self, topic: str, text: str) -> None:
        """Say once what is not known."""
        if topic not in self._silent:
            self._silent.add(topic)
            log.log(self._level, "%s", text)


def parse_queue(text: str) -> dict[str, JobState]:
    """States from squeue's table.

    Examples
    --------
    >>> line = f"{'12_0':40}{'RUNNING':20}{'1':12}{'2026-01-01T10:00:00':24}{'2026-01-01T14:00:00':24}{'None':60}"
    >>> parse_queue(line)["12_0"].end
    datetime.datetime(2026, 1, 1, 14, 0)
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("CLUSTER: ")]
    return dict(_queued(line) for line in lines)


def _queued(line: str) -> tuple[str, JobState]:
    row: dict[str, str] = {}
    for name, width in _COLUMNS.items():
        row[name], line = line[:width].strip(), line[width:]
    _require(row["JobArrayID"], row["State"], "squeue")
    requeues = int(row["RestartCnt"]) if row["RestartCnt"].isdigit() else None
    reason = "" if row["Reason"] == "None" else row["Reason"]
    times = {"start": _time(row["StartTime"]), "end": _time(row["EndTime"])}
    return row["JobArrayID"], JobState(state=row["State"], requeues=requeues, reason=reason, **times)


def parse_history(text: str) -> dict[str, JobState]:
    """States from sacct's table, which has one line for every time a job was started.

    Examples
    --------
    >>> parse_history("7|REQUEUED|Unknown|Unknown\\n7|CANCELLED by 0|Unknown|2026-01-01T14:00:00\\n")["7"]
    ... # doctest: +NORMALIZE_WHITESPACE
    JobState(state='CANCELLED', requeues=1, start=None, end=datetime.datetime(2026, 1, 1, 14, 0), reason='')
    """
    states: dict[str, JobState] = {}
    for line in text.splitlines():
        job, state, start, end = (*line.split("|"), "", "", "")[:4]
        _require(job, state, "sacct")
        before = states.get(job)
        requeues = 0 if before is None or before.requeues is None else before.requeues + 1
        word = state.split(" ")[0]
        states[job] = JobState(state=word, requeues=requeues, start=_time(start), end=_time(end))
    return states


def _require(job: str, state: str, program: str) -> None:
    """A job whose row cannot be read must not count as forgotten."""
    if not (re.fullmatch(r"\d+\S*", job) and re.match(r"[A-Z_]+\b", state)):
        raise NoAnswerError(f"{program} printed what is no job: {f'{job} {state}'.strip()[:80]!r}")


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None
