"""Slurm's programs: run them and read what they print about jobs and time limits."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from hpc_oialr.commands import Answer, run_command
from hpc_oialr.distributed.environment import all_variables

log = logging.getLogger(__name__)

# Questions are answered within a second, and a controller that hangs must not block the user (s).
QUESTION_S = 10.0
# Orders (cancel, source a site file) should succeed even while the controller is busy (s).
ORDER_S = 60.0
# Defaults of users and sites that change the output of programs: other columns, other jobs, other time formats.
_CHANGE_OUTPUT = re.compile(r"(SQUEUE|SACCT|SINFO|SCONTROL|SCANCEL)_|SLURM_(TIME_FORMAT|BITSTR_LEN|JSON|YAML)")
# Names and widths of squeue's columns.
_COLUMNS = {"JobArrayID": 40, "State": 20, "RestartCnt": 12, "EndTime": 24, "Reason": 60}
# Slurm does not answer; Slurm answers but no longer knows the job; the job is over but its run is not finished.
UNKNOWN, FORGOTTEN, ENDED = "UNKNOWN", "FORGOTTEN", "ENDED"
_OVER = re.compile(
    r"FORGOTTEN|ENDED|BOOT_FAIL|CANCELLED|COMPLETED|DEADLINE|FAILED|NODE_FAIL|OUT_OF_MEMORY|PREEMPTED|REVOKED|TIMEOUT"
)
# In scontrol's output a value, which may hold blanks, extends to the next name.
_FIELD = re.compile(r"(?:^|\s)([A-Z][\w:/]*)=(.*?)(?=\s[A-Z][\w:/]*=|$)")
FORMS = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds"
_TIME_FORM = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?", re.ASCII)


class NoAnswerError(Exception):
    """A program is missing, failed or hangs; the text is the reason in one line."""


def ask(command: Sequence[str], *, text: str | None = None, timeout_s: float = QUESTION_S) -> Answer:
    """Run a program without a shell, with ``text`` as its input; raises :class:`NoAnswerError` if it fails."""
    environ = {name: value for name, value in all_variables().items() if not _CHANGE_OUTPUT.match(name)}
    answer = run_command(command, timeout_s=timeout_s, environ=environ, text=text)
    if answer.trouble == "hung":
        raise NoAnswerError(f"{command[0]} does not answer within {timeout_s:g} s")
    if answer.trouble == "missing":
        raise NoAnswerError(f"there is no {command[0]} here")
    if answer.code != 0:
        raise NoAnswerError(" ".join(answer.stderr.split()) or f"exit code {answer.code}")
    return answer


@dataclass(frozen=True, kw_only=True)
class JobState:
    """A job at this moment, in Slurm's words; None and "" for what is not known."""

    state: str
    requeues: int | None = None
    end: datetime | None = None  # when it ended, or must end
    reason: str = ""  # why it waits

    @property
    def over(self) -> bool:
        """Whether it will not run again."""
        return _OVER.fullmatch(self.state) is not None


class Slurm:
    """States of jobs: from squeue for recent ones, from sacct for older ones where there is accounting.

    ``reached`` tells whether squeue answered the last question. What cannot be asked is logged once, at ``level``.
    """

    def __init__(self, *, level: int = logging.WARNING) -> None:
        self.reached, self._level = False, level
        self._silent: set[str] = set()

    def states(self, job_ids: Iterable[str]) -> dict[str, JobState]:
        """States by job id, e.g. "12" or "12_0"; jobs that Slurm does not know are left out."""
        wanted = set(job_ids)
        if not wanted:
            return {}
        columns = ",".join(f"{name}:{width}" for name, width in _COLUMNS.items())
        which = ["--noheader", "--array", "--states=all", f"--user={os.geteuid()}"]
        try:
            queue = parse_queue(ask(["squeue", *which, f"--Format={columns}"]).stdout)
            self.reached = True
        except NoAnswerError as error:
            queue, self.reached = {}, False
            self.warn_once(
                "squeue",
                f"Slurm does not answer (squeue: {error}): states of jobs are taken from their run folders",
            )
        found = {job: state for job, state in queue.items() if job in wanted}
        rest = sorted(wanted - set(found))
        if not rest or "sacct" in self._silent:
            return found
        which = ["--noheader", "--parsable2", "--allocations", "--duplicates", f"--jobs={','.join(rest)}"]
        try:
            return parse_history(ask(["sacct", *which, "--format=JobID,State,End"]).stdout) | found
        except NoAnswerError as error:
            self.warn_once(
                "sacct",
                f"no accounts of jobs are kept here (sacct: {error}): states of those that Slurm has forgotten are "
                "taken from their run folders",
            )
            return found

    def warn_once(self, topic: str, text: str) -> None:
        """Log a message, the first time only."""
        if topic not in self._silent:
            self._silent.add(topic)
            log.log(self._level, "%s", text)


def parse_queue(text: str) -> dict[str, JobState]:
    """States from squeue's table.

    >>> line = f"{'12_0':40}{'RUNNING':20}{'1':12}{'2026-01-01T14:00:00':24}{'None':60}"
    >>> parse_queue(line)["12_0"].end
    datetime.datetime(2026, 1, 1, 14, 0)
    """
    states = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("CLUSTER: "):
            continue
        row = []
        for width in _COLUMNS.values():
            row.append(line[:width].strip())
            line = line[width:]
        job, state, requeues, end, reason = row
        _require_job(job, state, "squeue")
        states[job] = JobState(
            state=state,
            requeues=int(requeues) if requeues.isdigit() else None,
            end=_time(end),
            reason="" if reason == "None" else reason,
        )
    return states


def parse_history(text: str) -> dict[str, JobState]:
    """States from sacct's table, which has one line for each time a job was started.

    >>> parse_history("7|REQUEUED|Unknown\\n7|CANCELLED by 0|2026-01-01T14:00:00\\n")["7"]
    JobState(state='CANCELLED', requeues=1, end=datetime.datetime(2026, 1, 1, 14, 0), reason='')
    """
    states: dict[str, JobState] = {}
    for line in text.splitlines():
        job, state, end = (*line.split("|"), "", "")[:3]
        _require_job(job, state, "sacct")
        before = states.get(job)
        requeues = 0 if before is None or before.requeues is None else before.requeues + 1
        states[job] = JobState(state=state.split(" ")[0], requeues=requeues, end=_time(end))
    return states


def _require_job(job: str, state: str, program: str) -> None:
    """A job whose row cannot be read must not count as forgotten: a second job would take its folder."""
    if not (re.fullmatch(r"\d+\S*", job) and re.match(r"[A-Z_]+\b", state)):
        raise NoAnswerError(f"{program} printed what is no job: {f'{job} {state}'.strip()[:80]!r}")


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None


def job_over(job: str) -> bool | None:
    """Whether a Slurm job will not run again; None if Slurm cannot be asked."""
    # Called repeatedly while a command waits for a folder; its result already says that nothing is known.
    slurm = Slurm(level=logging.INFO)
    state = slurm.states([job]).get(job)
    return state.over if state else True if slurm.reached else None


def show_job(job: str) -> dict[str, str]:
    """Fields of a job, e.g. ``{"JobState": "RUNNING", ...}``; none where scontrol is missing, as in most containers."""
    try:
        return dict(_FIELD.findall(ask(["scontrol", "--oneliner", "show", "job", job]).stdout.strip()))
    except NoAnswerError:
        return {}


def end_of(job: str) -> float | None:
    """Unix time at which Slurm will end a job (s); None if there is no limit or it is not known."""
    end = _time(show_job(job).get("EndTime", ""))
    return None if end is None else end.timestamp()


def seconds_of(text: str) -> int | None:
    """Seconds of a time limit; None if it has none of Slurm's forms.

    >>> [seconds_of(text) for text in ("90", "1:30", "04:00:00", "2-12", "1-0:30", "1-0:30:15")]
    [5400, 90, 14400, 216000, 88200, 88215]
    >>> seconds_of("4 hours")
    """
    match = _TIME_FORM.fullmatch(text.strip())
    if match is None:
        return None
    parts = [int(part) for part in match.groups()[1:] if part is not None]
    units = (3600, 60, 1) if match["days"] or len(parts) == 3 else (60, 1)
    return 86_400 * int(match["days"] or 0) + sum(p * unit for p, unit in zip(parts, units, strict=False))
