"""All checks, run at the same time in threads, with a deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpc_oialr.doctor import files, gpu, limits, mpi, network, packages, slurm
from hpc_oialr.doctor.context import CheckContext
from hpc_oialr.doctor.finding import Finding, note, problem

# Longer than any program that a check waits for may take.
_PATIENCE = 4


@dataclass(frozen=True)
class Check:
    """A topic and what looks at it."""

    topic: str
    look: Callable[[CheckContext], list[Finding]]


# The order of the table.
CHECKS = (
    Check("packages", packages.check_packages),
    Check("DeepSpeed", packages.check_deepspeed),
    Check("launcher", network.check_launcher),
    Check("Slurm programs", slurm.check_programs),
    Check("slurmctld", slurm.check_cluster),
    Check("account", slurm.check_account),
    Check("accounting", slurm.check_accounting),
    Check("job", slurm.check_job),
    Check("MPI", mpi.check_mpi),
    Check("GPU", gpu.check_gpus),
    Check("MASTER_ADDR", network.check_address),
    Check("MASTER_PORT", network.check_port),
    Check("interfaces", network.check_interfaces),
    Check("run folder", files.check_folder),
    Check("HDF5", files.check_hdf5),
    Check("TMPDIR", files.check_tmpdir),
    Check("threads", limits.check_threads),
    Check("limits", limits.check_limits),
)


def run_checks(context: CheckContext, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Findings of all checks, in their order; none of them can hang the caller."""
    found: dict[str, list[Finding]] = {}

    def look(check: Check) -> None:
        try:
            found[check.topic] = check.look(context)
        except Exception as error:
            # A system that nobody has thought of must not hide what all other checks have found.
            found[check.topic] = [note(check.topic, f"cannot be looked at: {type(error).__name__}: {error}")]

    # Daemons: a thread that hangs is left behind.
    threads = [threading.Thread(target=look, args=(check,), daemon=True) for check in checks]
    for thread in threads:
        thread.start()
    limit_s = _PATIENCE * context.timeout_s
    deadline = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    for check in checks:
        fix = "oialr doctor --timeout-s 60   (if the machine is only slow)"
        late = [problem(check.topic, f"no answer within {limit_s:g} s", fix)]
        found.setdefault(check.topic, late)
    return [finding for check in checks for finding in found[check.topic]]
