"""Findings of all processes of a job in one table: the worst of each check, and the nodes it was found on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpc_oialr.doctor.context import CheckContext
from hpc_oialr.doctor.finding import Finding, ok, problem
from hpc_oialr.doctor.network import by_hand, unset
from hpc_oialr.errors import WorldError

_SLOW = 3
_MOST_NODES = 4


@dataclass(frozen=True)
class Row:
    """A finding, and the nodes it is about; none if all processes agree."""

    finding: Finding
    nodes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The nodes, as text."""
        more = f" and {len(self.nodes) - _MOST_NODES} more" if len(self.nodes) > _MOST_NODES else ""
        return ", ".join(self.nodes[:_MOST_NODES]) + more


@dataclass(frozen=True)
class Aggregated:
    """What is to be shown.

    Attributes
    ----------
    rows
        Lines of the table.
    processes
        How many processes it is about.
    shown
        Whether this process shows it.
    """

    rows: tuple[Row, ...]
    processes: int
    shown: bool

    @property
    def problems(self) -> list[Row]:
        """Lines that need a fix."""
        return [row for row in self.rows if row.finding.state == "problem"]


def aggregate(context: CheckContext, findings: Sequence[Finding]) -> Aggregated:
    """Show all processes' findings on the main one; each its own where they cannot meet.

    A collective call, if there are several processes. Each sends its findings, some kB.
    """
    if context.size == 1:
        return Aggregated(tuple(map(Row, findings)), 1, shown=True)
    try:
        everyone = _meet(context, findings)
    except WorldError as error:
        fix = (
            unset(context)
            if by_hand(context)
            else "oialr doctor on each node; look at MASTER_ADDR and MASTER_PORT"
        )
        alone = [*findings, problem("World", str(error), fix)]
        return Aggregated(tuple(map(Row, alone)), 1, shown=True)
    return Aggregated(tuple(worst(everyone)), context.size, shown=context.is_main)


def _meet(context: CheckContext, findings: Sequence[Finding]) -> list[tuple[str, list[Finding]]]:
    """Node and findings of each process, in order of rank."""
    from hpc_oialr.distributed.world import World

    limit_s = context.timeout_s * (1 if by_hand(context) else _SLOW)
    world = World.from_environment(device="cpu", timeout_s=limit_s, environ=context.environ)
    try:
        met = ok("World", f"{world.size} processes met")
        return world.all_gather_object((context.node, [*findings, met]))
    finally:
        world.close()


def worst(everyone: Sequence[tuple[str, Sequence[Finding]]]) -> list[Row]:
    """Of each name the worst finding, with the nodes it was made on unless all made the same.

    Parameters
    ----------
    everyone
        Node and findings of each process.
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
        # What one process alone has looked at is of all; a problem may yet be its node's own.
        of_all = bad.state != "problem" or set(nodes) == {node for node, _ in everyone}
        rows.append(Row(bad, () if alike and of_all else nodes))
    return rows
