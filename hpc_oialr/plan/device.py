"""What a process computes on: its memory, and how fast it gets work done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hpc_oialr.plan.collectives import Link
from hpc_oialr.plan.network import Origin

# Of the memory's bandwidth, what kernels that only move data reach.
BANDWIDTH_EFFICIENCY = 0.8


@dataclass(frozen=True)
class Work:
    """What one process has to do.

    Attributes
    ----------
    flops
        Floating-point operations of matrix products and convolutions, by dtype ("float32", "bfloat16", ...).
    moved
        Bytes that all other operations read and write.
    operations
        How many there are: kernels to be launched.
    """

    flops: Mapping[str, float]
    moved: float
    operations: float

    @property
    def total_flops(self) -> float:
        """Of all dtypes."""
        return sum(self.flops.values())


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU, or the cores of a node.

    Attributes
    ----------
    name
        As on the command line.
    origin, source
        Measured, from a data sheet, or assumed; and where it is from.
    memory_gib
        Of one process on a GPU, of all processes of the node on CPUs.
    peak
        FLOP/s by dtype: of a GPU, or of all cores of a node.
    efficiency
        Share of ``peak`` that a model's matrix products reach.
    bandwidth
        Of the memory (bytes/s).
    launch_s
        Time to launch a kernel; a step takes at least this for every one.
    svd_flops
        FLOP/s of an SVD.
    cores
        Cores of a node where processes share them; 0 for a GPU, which belongs to one process.
    sharing
        Measured: by how much a process slows down when so many of a node compute at once, each with its share
        of the cores as threads.
    overlap
        Share of the messages of a backward pass that go on beside it.
    inside
        Link between two devices of a node.
    """

    name: str
    origin: Origin
    source: str
    memory_gib: float
    peak: Mapping[str, float]
    efficiency: float
    bandwidth: float
    launch_s: float
    svd_flops: float
    inside: Link
    cores: int = 0
    sharing: Mapping[int, float] = field(default_factory=dict)
    overlap: float = 0.0

    def memory_of_process_gib(self, per_node: int) -> float:
        """What one of ``per_node`` processes may use."""
        return self.memory_gib / per_node if self.cores else self.memory_gib

    def threads(self, per_node: int) -> int:
        """Of one process."""
        return max(1, self.cores // per_node)

    def slowdown(self, per_node: int) -> float:
        """Of a process with its own threads, by the others of its node.

        Between measured numbers of processes, and beyond the last, it grows with the processes a core has.
        """
        if not self.cores or per_node == 1:
            return 1.0
        known = {1: 1.0} | dict(self.sharing)
        below = max(p for p in known if p <= per_node)
        return known[below] * max(1.0, per_node / max(below, self.cores))

    def seconds(self, work: Work, per_node: int = 1) -> float:
        """Roofline: products at the speed of arithmetic, the rest at that of memory, never faster than launches."""
        share = self.threads(per_node) / self.cores if self.cores else 1.0
        slowest = min(self.peak.values())
        products = sum(n / (self.peak.get(dtype, slowest) * share) for dtype, n in work.flops.items())
        moving = work.moved / (self.bandwidth * share * BANDWIDTH_EFFICIENCY)
        busy = (products / self.efficiency + moving) * self.slowdown(per_node)
        return max(busy, work.operations * self.launch_s)
