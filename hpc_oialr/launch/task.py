"""Main program of a submitted job's processes: ``python -m hpc_oialr.launch.task FOLDER``.

It replaces submitit's own, which exits with 1 whatever happened: the batch script requeues by the code.
"""

from __future__ import annotations

import os
import shlex
import stat
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from hpc_oialr.distributed.environment import launch_info
from hpc_oialr.distributed.signals import end_with_parent, leave_upon_term
from hpc_oialr.errors import OIALRError
from hpc_oialr.exit_codes import PROCESS_LOST, STOPPED, of_error, of_task
from hpc_oialr.redaction import one_line
from hpc_oialr.streams import tolerate_output_failures

# submitit requeues the job upon its signal. Here the batch script does, so submitit gets a signal that nobody sends.
_UNUSED_SIGNAL = "URG"
# submitit's local controller counts time by its sleeps, so its signal may come early by our clock (s).
_LEEWAY_S = 2.0
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH


def require_own(folder: Path, *files: Path) -> None:
    """Raise :class:`OIALRError` if a folder, or a file in it, belongs to another user or is writable by others.

    Reading a pickle runs its code, so only pickles that nobody else can have written are read.
    """
    user = os.geteuid()
    # Files in a folder that others cannot enter are safe whatever their mode.
    closed = {folder} if not folder.stat().st_mode & _OTHERS_ENTER else {folder, *files}
    for path in (folder, *files):
        status = path.stat()
        if status.st_uid != user:
            raise OIALRError(
                f"{path} belongs to user {status.st_uid}; pickles are read only from what belongs to you (user {user}), "
                "since reading one runs its code. Submit the run into a folder of your own."
            )
        if path in closed and status.st_mode & _OTHERS_WRITE:
            raise OIALRError(
                f"{path} has mode {stat.S_IMODE(status.st_mode):04o}; pickles are read only where nobody else can "
                f"write, since reading one runs its code. If you trust what is there: chmod go-w {shlex.quote(str(path))}"
            )


def main(folder: Path) -> None:
    """Run the job that was submitted from ``folder``; OIALRError if another version of this package submitted it."""
    require_own(folder, *folder.glob("*_submitted.pkl"))
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = _UNUSED_SIGNAL
    from submitit.core.submission import process_job

    try:
        process_job(folder)
    except (AttributeError, ModuleNotFoundError) as error:
        # As pickle says it, not the run.
        if not str(error).startswith(("Can't get attribute", "No module named 'hpc_oialr")):
            raise
        raise OIALRError(
            f"the job in {folder} was submitted by another version of hpc_oialr ({error}). Submit the run again, with "
            "the same --out: it resumes from its last checkpoint."
        ) from error


def entry() -> None:
    """Exit at once with the code: what is left of a process group may hang at interpreter shutdown."""
    started = time.monotonic()
    code: object = 0
    tolerate_output_failures()
    leave_upon_term(PROCESS_LOST)
    if "SUBMITIT_LOCAL_JOB_ID" in os.environ:
        # Without its controller the process would run unnoticed, and the next submission find the folder in use.
        end_with_parent()
    try:
        main(Path(sys.argv[-1]))
    except SystemExit as left:
        code = left.code or 0
    except OIALRError as error:
        code = of_error(error)
        sys.stderr.write(one_line(f"oialr: error: {error}") + "\n")
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    done = of_task(code if isinstance(code, int) else 1, launch_info().launcher)
    if done == STOPPED and at_local_limit(time.monotonic() - started):
        from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE

        done = LOCAL_REQUEUE_RETURN_CODE
    os._exit(done)


def at_local_limit(elapsed_s: float, environ: Mapping[str, str] | None = None) -> bool:
    """Whether the local executor's controller has stopped this process because its time is up.

    The controller then starts the tasks again, five times at most, if one of them exits with submitit's code for that.

    >>> limit = {"SUBMITIT_LOCAL_TIMEOUT_S": "600", "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "120"}
    >>> at_local_limit(100.0, limit), at_local_limit(481.0, limit), at_local_limit(481.0, {})
    (False, True, False)
    """
    env = os.environ if environ is None else environ
    if "SUBMITIT_LOCAL_TIMEOUT_S" not in env:
        return False
    limit_s = int(env["SUBMITIT_LOCAL_TIMEOUT_S"]) - int(env["SUBMITIT_LOCAL_SIGNAL_DELAY_S"])
    return elapsed_s >= limit_s - _LEEWAY_S


if __name__ == "__main__":
    entry()
