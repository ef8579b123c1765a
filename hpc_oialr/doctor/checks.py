"""Run all checks in parallel with a deadline; gather the findings of all ranks of a job."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from hpc_oialr.doctor import gpu, host, mpi, network, packages, slurm
from hpc_oialr.doctor.context import SLOW, CheckContext, Finding, Scope, note, ok, problem
from hpc_oialr.errors import WorldError

Check = Callable[[CheckContext], list[Finding]]
# Topic, which processes run the check, and the check; in the order of the table.
CHECKS: Sequence[tuple[str, Scope, Check]] = (
    ("packages", "node", packages.check_packages),
    ("launcher", "process", network.check_launcher),
    ("Slurm programs", "main", slurm.check_programs),
    ("slurmctld", "slurm", slurm.check_cluster),
    ("job", "slurm", slurm.check_job),
    ("MPI", "process", mpi.check_mpi),
    ("GPU", "process", gpu.check_gpus),
    ("MASTER_ADDR", "process", network.check_address),
    ("run folder", "node", host.check_folder),
    ("HDF5", "node", host.check_hdf5),
    ("threads", "process", host.check_threads),
    ("limits", "process", host.check_limits),
)
# Times the timeout of one program: longer than any check waits for its programs.
_PATIENCE = 4


def run_checks(context: CheckContext, checks: Sequence[tuple[str, Scope, Check]] = CHECKS) -> list[Finding]:
    """Findings of this process's checks, in their order; a check that hangs or raises is a finding, too."""
    due = {topic: check for topic, scope, check in checks if context.in_scope(scope)}
    found: dict[str, list[Finding]] = {}

    def look(topic: str) -> None:
        try:
            found[topic] = due[topic](context)
        except Exception as error:
            # An unexpected system must not hide the findings of other checks.
            found[topic] = [note(topic, f"check failed: {type(error).__name__}: {error}")]

    # Daemons: a thread that hangs is left behind.
    threads = [threading.Thread(target=look, args=(topic,), daemon=True) for topic in due]
    for thread in threads:
        thread.start()
    limit_s = _PATIENCE * context.timeout_s
    deadline = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = f"no answer within {limit_s:g} s"
    fix = "oialr doctor --timeout-s 60   (if the machine is only slow)"
    return [each for topic in due for each in found.get(topic, [problem(topic, late, fix)])]


def aggregate(context: CheckContext, findings: Sequence[Finding]) -> tuple[Sequence[Finding], int] | None:
    """Findings of all ranks and their number on rank 0, None on others; each rank's own if the ranks cannot connect.

    Collective if there are several ranks; each sends its findings, a few kB.
    """
    if context.size == 1:
        return findings, 1
    from hpc_oialr.distributed.world import World

    limit_s = context.timeout_s * (1 if network.by_hand(context) else SLOW)
    try:
        world = World.from_environment(device="cpu", timeout_s=limit_s, environ=context.environ)
        try:
            met = ok("World", f"{world.size} ranks met")
            everyone = world.all_gather_object((context.node, [*findings, met]))
        finally:
            world.close()
    except WorldError as error:
        fix = "oialr doctor on each node; look at MASTER_ADDR and MASTER_PORT"
        fix = network.unset(context) if network.by_hand(context) else fix
        return [*findings, problem("World", str(error), fix)], 1
    return (worst(everyone), context.size) if context.is_main else None


def worst(everyone: Sequence[tuple[str, Sequence[Finding]]]) -> list[Finding]:
    """The worst finding of each name, with its nodes unless all ranks agree; given node and findings of each rank."""
    by_name: dict[str, list[tuple[str, Finding]]] = {}
    for node, found in everyone:
        for finding in found:
            by_name.setdefault(finding.name, []).append((node, finding))
    findings = []
    for made in by_name.values():
        bad = max((finding for _, finding in made), key=lambda finding: finding.severity)
        nodes = tuple(dict.fromkeys(node for node, finding in made if finding.severity == bad.severity))
        alike = all(finding.severity == bad.severity for _, finding in made)
        # What only one rank checks counts for all, but a problem may concern its node only.
        of_all = bad.state != "problem" or set(nodes) == {node for node, _ in everyone}
        findings.append(replace(bad, nodes=() if alike and of_all else nodes))
    return findings
