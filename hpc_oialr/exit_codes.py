"""Exit codes of a run, for its batch script.

=====  ==========================================================================================
code   meaning
=====  ==========================================================================================
0      finished
2      stopped by an error that the user can fix; the reason is the last line on standard error
75     stopped on request with a checkpoint: start the same command again (EX_TEMPFAIL)
76     another rank died or hung: start again from the last checkpoint
other  a crash, or 128 + the number of the signal that killed it
=====  ==========================================================================================

srun returns the highest code of its tasks, and when one exits it ends the others, which then exit with 76. So tasks
of srun add 200 for an error that a restart does not cure: 202 instead of 2, 201 instead of 1.
"""

from __future__ import annotations

from hpc_oialr.errors import OIALRError, ProcessLostError

FINISHED = 0
USER_ERROR = 2
STOPPED = 75
PROCESS_LOST = 76


def of_error(error: OIALRError) -> int:
    """Exit code of a run that ended with ``error``."""
    return PROCESS_LOST if isinstance(error, ProcessLostError) else USER_ERROR


def of_task(code: int, launcher: str) -> int:
    """Exit code of one of several ranks.

    Examples
    --------
    >>> of_task(USER_ERROR, "slurm"), of_task(STOPPED, "slurm"), of_task(USER_ERROR, "torchrun")
    (202, 75, 2)
    """
    return code + 200 if launcher == "slurm" and 0 < code < 55 else code
