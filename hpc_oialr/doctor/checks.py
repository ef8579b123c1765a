"""All checks, at the same time and each within its time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpc_oialr.doctor import files, gpu, limits, mpi, network, packages, slurm, threads
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
    Check("threads", threads.check_threads),
    Check("limits", limits.check_limits),
)


def run_checks(context: CheckContext, checks: Sequence[Check] = CHECKS) -> list[Finding]:
    """Findings of all checks, in their order; none of them can hang the caller."""
    running = [_Running(check, context) for check in checks]
    deadline = time.monotonic() + _PATIENCE * context.timeout_s
    return [finding for each in running for finding in each.findings(deadline)]


class _Running:
    """A check in a thread of its own, which may be left behind."""

    def __init__(self, check: Check, context: CheckContext) -> None:
        self.check, self.context = check, context
        self.found: list[Finding] | None = None
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        try:
            self.found = self.check.look(self.context)
        except Exception as error:
            # A system that nobody has thought of must not hide what all other checks have found.
            self.found = [note(self.check.topic, f"cannot be looked at: {type(error).__name__}: {error}")]

    def findings(self, deadline: float) -> list[Finding]:
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.found is None:
            found = f"no answer within {_PATIENCE * self.context.timeout_s:g} s"
            return [
                problem(
                    self.check.topic, found, "oialr doctor --timeout-s 60   (if the machine is only slow)"
                )
            ]
        return self.found
