"""All checks, run at the same time with a deadline; findings of all processes of a job in one table."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpc_oialr.doctor import files, gpu, limits, mpi, network, packages, slurm
from hpc_oialr.doctor.context import CheckContext, Finding, Scope, note, ok, problem
from hpc_oialr.errors import WorldError

Check = Callable[[CheckContext], list[Finding]]
# Topic, which processes run the check, and the check; in the order of the table.
CHECKS: Sequence[tuple[str, Scope, Check]] = (
    ("packages", "node", packages.check_packages),
    ("DeepSpeed", "node", packages.check_deepspeed),
    ("launcher", "process", network.check_launcher),
    ("Slurm programs", "main", slurm.check_programs),
    ("slurmctld", "slurm", slurm.check_cluster),
    ("account", "slurm", slurm.check_account),
    ("accounting", "slurm", slurm.check_accounting),
    ("job", "slurm", slurm.check_job),
    ("MPI", "process", mpi.check_mpi),
    ("GPU", "process", gpu.check_gpus),
    ("MASTER_ADDR", "process", network.check_address),
    ("MASTER_PORT", "process", network.check_port),
    ("interfaces", "node", network.check_interfaces),
    ("run folder", "node", files.check_folder),
    ("HDF5", "node", files.check_hdf5),
    ("TMPDIR", "node", files.check_tmpdir),
    ("threads", "process", limits.check_threads),
    ("limits", "process", limits.check_limits),
)
# Times the timeout of one program: longer than any check waits for its programs.
_PATIENCE = 4
_SLOW = 3
_MOST_NODES = 4


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
    late, fix = (
        f"no answer within {limit_s:g} s",
        "oialr doctor --timeout-s 60   (if the machine is only slow)",
    )
    return [each for topic in due for each in found.get(topic, [problem(topic, late, fix)])]


@dataclass(frozen=True)
class Row:
    """A finding, and the nodes it is about; no nodes if all processes agree."""

    finding: Finding
    nodes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The nodes, as text."""
        more = f" and {len(self.nodes) - _MOST_NODES} more" if len(self.nodes) > _MOST_NODES else ""
        return ", ".join(self.nodes[:_MOST_NODES]) + more


@dataclass(frozen=True)
class Summary:
    """Rows about so many processes, and whether this process prints them."""

    rows: tuple[Row, ...]
    processes: int
    shown: bool

    @property
    def problems(self) -> list[Row]:
        """Rows that need a fix."""
        return [row for row in self.rows if row.finding.state == "problem"]


def aggregate(context: CheckContext, findings: Sequence[Finding]) -> Summary:
    """Findings of all processes on rank 0; each process's own where they cannot meet.

    A collective call if there are several processes; each sends its findings, some kB.
    """
    if context.size == 1:
        return Summary(tuple(map(Row, findings)), 1, shown=True)
    from hpc_oialr.distributed.world import World

    limit_s = context.timeout_s * (1 if network.by_hand(context) else _SLOW)
    try:
        world = World.from_environment(device="cpu", timeout_s=limit_s, environ=context.environ)
        try:
            met = ok("World", f"{world.size} processes met")
            everyone = world.all_gather_object((context.node, [*findings, met]))
        finally:
            world.close()
    except WorldError as error:
        fix = "oialr doctor on each node; look at MASTER_ADDR and MASTER_PORT"
        fix = network.unset(context) if network.by_hand(context) else fix
        return Summary(tuple(map(Row, [*findings, problem("World", str(error), fix)])), 1, shown=True)
    return Summary(tuple(worst(everyone)), context.size, shown=context.is_main)


def worst(everyone: Sequence[tuple[str, Sequence[Finding]]]) -> list[Row]:
    """The worst finding of each name, with the nodes where it was made unless all made the same.

    ``everyone`` holds node and findings of each process.
    """
    by_name: dict[str, list[tuple[str, Finding]]] = {}
    for node, findings in everyone:
        for finding in findings:
            by_name.setdefault(finding.name, []).append((node, finding))
    rows = []
    for made in by_name.values():
        bad = max((finding for _, finding in made), key=lambda finding: finding.severity)
        nodes = tuple(dict.fromkeys(node for node, finding in made if finding.severity == bad.severity))
        alike = all(finding.severity == bad.severity for _, finding in made)
        # What only one process checks holds for all; but a problem may be its node's own.
        of_all = bad.state != "problem" or set(nodes) == {node for node, _ in everyone}
        rows.append(Row(bad, () if alike and of_all else nodes))
    return rows
