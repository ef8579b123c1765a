"""The last command of a batch script: ``python -m hpc_oialr.launch.requeue CODE``.

Puts the job back into the queue if its run was stopped before its end and can go on, so often and no more.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hpc_oialr.errors import OIALRError
from hpc_oialr.exit_codes import PROCESS_LOST, STOPPED
from hpc_oialr.launch.scontrol import requeue, show_job
from hpc_oialr.processes.batch_job import BatchJob, batch_job, max_requeues

_FIRST_SIGNAL, _LAST_SIGNAL = 128, 64
# Somebody at a terminal, not the batch system.
_INTERRUPT = 130


@dataclass(frozen=True)
class Decision:
    """Whether a job goes back into the queue, and what is said of it."""

    requeue: bool
    text: str


def decide(code: int, job: BatchJob, limit: int, state: Mapping[str, str]) -> Decision:
    """What becomes of a job whose run has ended.

    Parameters
    ----------
    code
        Exit code of the run; see :mod:`hpc_oialr.exit_codes`.
    job
        The job.
    limit
        How often it may be requeued.
    state
        What Slurm says of it; nothing if it says nothing.
    """
    why = reason(code)
    if why is None:
        return Decision(False, "")
    if state and not _may_go_on(state):
        # scancel, scontrol requeue and preemption have decided already.
        return Decision(False, f"{why}; Slurm ends job {job.id} itself, nothing to do")
    if job.restarts >= limit:
        more = f"submit the same command with the same run folder again, or raise OIALR_MAX_REQUEUES above {limit}"
        return Decision(
            False, f"{why}; job {job.id} was requeued {job.restarts} times, of {limit}. To go on: {more}"
        )
    return Decision(True, f"{why}; requeue {job.restarts + 1} of {limit}")


def reason(code: int) -> str | None:
    """Why a run with this exit code should go on; None if it should not.

    Examples
    --------
    >>> reason(0), reason(2), reason(137), reason(202)
    (None, None, 'killed by signal 9', None)
    """
    if code == STOPPED:
        return "stopped with a checkpoint"
    if code == PROCESS_LOST:
        return "a process was lost"
    if 0 < code - _FIRST_SIGNAL <= _LAST_SIGNAL and code != _INTERRUPT:
        return f"killed by signal {code - _FIRST_SIGNAL}"
    return None


def main(argv: Sequence[str], say: Callable[[str], object] = sys.stderr.write) -> int:
    """Decide, tell and do; the exit code for the batch script, which is that of the run."""
    if len(argv) != 1 or not argv[0].isdigit():
        say("usage: python -m hpc_oialr.launch.requeue EXIT_CODE_OF_THE_RUN\n")
        return 2
    code, job = int(argv[0]), batch_job()
    if job is None or reason(code) is None:
        return code
    try:
        decision = decide(code, job, max_requeues(), show_job(job.id))
    except OIALRError as error:
        decision = Decision(False, str(error))
    say(f"oialr: {decision.text}\n")
    failure = requeue(job.id) if decision.requeue else None
    if failure is not None:
        say(f"oialr: {failure}\n")
    return code


def _may_go_on(state: Mapping[str, str]) -> bool:
    """A job that still runs, or that is being ended for its time limit only."""
    return state.get("JobState") == "RUNNING" or state.get("Reason") == "TimeLimit"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
