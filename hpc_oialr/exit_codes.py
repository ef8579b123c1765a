"""How a run tells its batch script what became of it.

=====  ==========================================================================================
code   meaning
=====  ==========================================================================================
0      finished
2      stopped by what the user can put right; the reason is the last line on standard error
75     stopped on request, a checkpoint is written: start the same command again (EX_TEMPFAIL)
76     another process died or hung: start again from the last checkpoint
other  a crash, or 128 + the number of the signal that killed it
=====  ==========================================================================================
"""

from __future__ import annotations

from hpc_oialr.errors import OIALRError, ProcessLostError

FINISHED = 0
USER_ERROR = 2
STOPPED = 75
PROCESS_LOST = 76


def of_error(error: OIALRError) -> int:
    """The code of a run that ended with ``error``."""
    return PROCESS_LOST if isinstance(error, ProcessLostError) else USER_ERROR
