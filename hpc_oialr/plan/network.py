"""How long messages take between processes of one node and of many."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from hpc_oialr.plan.collectives import FITTED, Link, seconds

Origin = Literal["measured", "preset", "assumed"]


@dataclass(frozen=True)
class Placement:
    """Where the members of a group are.

    Attributes
    ----------
    nodes, per_node
        Nodes with members, and members on each.
    groups
        Groups that do the same at once on the same nodes, and share their adapters.
    """

    nodes: int
    per_node: int
    groups: int = 1

    @property
    def processes(self) -> int:
        """Members in all."""
        return self.nodes * self.per_node


@dataclass(frozen=True, kw_only=True)
class Network:
    """Links, and what collectives over them take.

    Attributes
    ----------
    name
        As on the command line.
    origin, source
        Measured, from a data sheet, or assumed; and where it is from.
    inside
        Between two processes of one node.
    between
        Of one network adapter.
    adapters
        Of a node, shared by its processes.
    start_s
        Fixed cost of a collective.
    fits
        Measured links by collective and number of processes; these go before ``inside`` and ``between``.
    """

    name: str
    origin: Origin
    source: str
    inside: Link
    between: Link
    adapters: int = 1
    start_s: float = 0.0
    fits: Mapping[tuple[str, int], Link] = field(default_factory=dict)

    def seconds(self, collective: str, size: float, where: Placement) -> float:
        """Time of one collective over a tensor of ``size`` bytes in all.

        On several nodes an all-reduce is a reduce-scatter inside each node, an all-reduce of each part between
        the nodes, and an all-gather inside; the others lack one of the three.
        """
        if where.processes == 1:
            return 0.0
        if self.fits:
            return self._as_measured(collective, size, where.processes)
        return self.start_s + (
            self._on_one_node(collective, size, where.per_node)
            if where.nodes == 1
            else self._on_many(collective, size, where)
        )

    def _as_measured(self, collective: str, size: float, processes: int) -> float:
        """By the link that was fitted at the nearest number of processes."""
        known = [p for name, p in self.fits if name == collective]
        nearest = min(known, key=lambda p: abs(math.log(p / processes)))
        link = self.fits[collective, nearest]
        return seconds(collective, link, processes, size, algorithms=[FITTED[collective]])

    def _on_one_node(self, collective: str, size: float, processes: int) -> float:
        return seconds(collective, self.inside, processes, size)

    def _on_many(self, collective: str, size: float, where: Placement) -> float:
        share = self.adapters / (where.per_node * where.groups)
        wire = Link(self.between.alpha_s, self.between.beta_s_per_byte / share)
        if collective in ("broadcast", "all_to_all"):
            whole = self.between if collective == "broadcast" else wire
            return seconds(collective, whole, where.nodes, size) + self._on_one_node(
                collective, size, where.per_node
            )
        part = size / where.per_node
        inside = sum(
            self._on_one_node(step, size, where.per_node)
            for step in ("reduce_scatter", "all_gather")
            if collective in ("all_reduce", step)
        )
        return inside + seconds(collective, wire, where.nodes, part)
