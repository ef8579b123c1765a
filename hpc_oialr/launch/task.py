"""Main program of a submitted job's processes: ``python -m hpc_oialr.launch.task FOLDER``.

In the place of submitit's own, which leaves with code 1 whatever happened: the batch script decides by the code.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from hpc_oialr.errors import OIALRError
from hpc_oialr.exit_codes import PROCESS_LOST, of_error, of_task
from hpc_oialr.launch.trust import require_own
from hpc_oialr.processes.environment import launch_info
from hpc_oialr.processes.signals import leave_upon_term

# submitit requeues by itself on its signal. Here the batch script does, so it listens to one that nobody sends.
_UNUSED_SIGNAL = "URG"


def main(folder: Path) -> int:
    """Run the job that was submitted from ``folder``; its exit code."""
    require_own(folder, *folder.glob("*_submitted.pkl"))
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = _UNUSED_SIGNAL
    from submitit.core.submission import process_job

    process_job(folder)
    return 0


def entry() -> None:
    """Leave with the code, at once: what is left of a process group may hang at the interpreter's end."""
    code: object = 1
    leave_upon_term(PROCESS_LOST)
    try:
        code = main(Path(sys.argv[1]))
    except SystemExit as left:
        code = left.code or 0
    except OIALRError as error:
        code = of_error(error)
        sys.stderr.write(f"oialr: error: {error}\n")
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(of_task(code if isinstance(code, int) else 1, launch_info().launcher))


if __name__ == "__main__":
    entry()
