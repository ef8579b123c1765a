"""Speeds and links of the machine a run is planned for: measured here, or stated by vendors and operators.

A collective of n bytes among P processes takes ``passes (ceil(log2 P) latency + (P-1)/P n / bandwidth)``, two passes
for an all-reduce, one for all others: the cost of recursive halving and doubling (Thakur, Rabenseifner and Gropp, Int.
J. High Perform. Comput. Appl. 19, 2005), and of NCCL's rings and trees at best.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.benchmark import Timer

from hpc_oialr.distributed.environment import usable_cores
from hpc_oialr.errors import DataError, UnknownNameError
from hpc_oialr.linalg.work_plan import svd_cost
from hpc_oialr.plan.tracer import Message

GIB = 1024**3


@dataclass(frozen=True)
class Link:
    """Latency of a message, and bandwidth."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, collective: str, size: float, processes: int) -> float:
        """Time of a collective over a tensor of ``size`` bytes in all; 0 for one process.

        Examples
        --------
        >>> Link(0.0, 1e9).seconds("all_reduce", 1e9, 4)
        1.5
        """
        latencies, share = _coefficients(collective, processes)
        return latencies * self.latency_s + share * size / self.bytes_per_s

    @classmethod
    def fit(cls, collective: str, processes: int, measured: Iterable[tuple[float, float]]) -> Link:
        """Fit measured (bytes, seconds): least squares of relative errors."""
        latencies, share = _coefficients(collective, processes)
        rows = np.array([(latencies / seconds, share * size / seconds) for size, seconds in measured])
        latency, inverse = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
        if latency < 0 or inverse < 0:
            # Neither can be negative: only the other one is fitted.
            kept = rows[:, 1] if latency < 0 else rows[:, 0]
            only = float(kept.sum() / np.square(kept).sum())
            latency, inverse = (0.0, only) if latency < 0 else (only, 0.0)
        return cls(float(latency), 1.0 / float(inverse) if inverse else math.inf)


def _coefficients(collective: str, processes: int) -> tuple[float, float]:
    """Factors of latency and of the whole tensor's bytes in a collective's time."""
    passes = 2 if collective == "all_reduce" else 1
    return passes * math.ceil(math.log2(processes)), passes * (processes - 1) / processes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Speeds that a run reaches, of one GPU or of all cores of a node, and links between processes."""

    speeds: str  # where the speeds are from: "measured: ..." or "stated: ..."
    links: str  # the same for the links
    assumed: str  # what had to be assumed
    memory_gib: float  # of a GPU, or of a node on CPUs
    flops: Mapping[str, float]  # FLOP/s of matrix products by dtype
    bytes_per_s: float  # of other operations
    launch_s: float  # to launch an operation
    svd_flops: float  # FLOP/s of SVDs
    overlap: float  # share of the backward pass during which gradients are sent
    inside: Link  # between two processes of a node
    between: Link  # of one network adapter
    adapters: int = 1  # of a node, shared by its processes
    # Measured links by collective and number of processes; preferred to ``inside`` and ``between``.
    fitted: Mapping[tuple[str, int], Link] = field(default_factory=dict)
    cores: int = 0  # of a node where processes share them; 0 for GPUs
    # Measured slowdown of a process where so many of a node compute at once, each with its cores.
    sharing: Mapping[int, float] = field(default_factory=dict)

    def memory_of_process_gib(self, per_node: int) -> float:
        """Memory of one of ``per_node`` processes."""
        return self.memory_gib / per_node if self.cores else self.memory_gib

    def threads(self, per_node: int) -> int:
        """Threads of one process."""
        return max(1, self.cores // per_node)

    def speed(self, per_node: int) -> float:
        """Speed of one of ``per_node`` processes, relative to one with the whole node."""
        return self.threads(per_node) / self.cores / self.slowdown(per_node) if self.cores else 1.0

    def slowdown(self, per_node: int) -> float:
        """Slowdown of a process by the others of its node; proportional beyond the largest measured number."""
        if not self.cores or per_node == 1:
            return 1.0
        known = {1: 1.0, **self.sharing}
        below = max(p for p in known if p <= per_node)
        return known[below] * max(1.0, per_node / max(below, self.cores))

    def messages_s(self, messages: Iterable[Message], per_node: int) -> float:
        """Time of messages one after another."""
        return sum(self.link(m, per_node).seconds(m.collective, m.size, m.processes) for m in messages)

    def link(self, message: Message, per_node: int) -> Link:
        """The slowest link a message uses; between nodes, processes of a node use its adapters together."""
        measured = [p for collective, p in self.fitted if collective == message.collective]
        if measured:
            nearest = min(measured, key=lambda p: abs(math.log(p / message.processes)))
            return self.fitted[message.collective, nearest]
        if (message.processes - 1) * message.stride < per_node:
            return self.inside
        # So many groups have members on the same nodes, and share their adapters.
        wire = self.between.bytes_per_s * self.adapters / min(message.stride, per_node)
        alone = message.stride >= per_node
        return Link(self.between.latency_s, wire if alone else min(self.inside.bytes_per_s, wire))


# FLOP/s are those of dense matrix products, without sparsity; fp32 is plain fp32, as torch uses TF32 only on request.

# Assumed: share of the peak that transformers and CNNs of common sizes reach without torch.compile.
EFFICIENCY = 0.4
# Assumed: cuSOLVER works on one small matrix at a time, bound by latency rather than arithmetic.
SVD_SHARE = 0.01
# Assumed: share of a link's bandwidth that large collectives reach, and of the memory's that kernels reach.
LINK_EFFICIENCY = 0.8
# Assumed: eager kernels, launched one by one from Python.
LAUNCH_S = 6e-6
# Assumed: gradients are sent during the backward pass, except for the last bucket.
OVERLAP = 0.8
# NCCL's own estimates, src/graph/tuning.cc (hwLat, ring, protocol Simple): 3.4 us a hop over NVLink, 9.6 us over
# the network. RCCL has the same table.
NVLINK_HOP_S, NETWORK_HOP_S = 3.4e-6, 9.6e-6


class GPUPreset(NamedTuple):
    """A data sheet: memory as CUDA shows it, TFLOP/s in bf16 and fp32, memory's TB/s, GB/s to a GPU of the node."""

    source: str
    memory_gib: float
    bf16: float
    fp32: float
    tb_per_s: float
    peer_gb_per_s: float


class ClusterPreset(NamedTuple):
    """GPU nodes of a cluster; GPUs and adapters per node."""

    gpu: str
    network: str
    gpus_per_node: int
    adapters: int


GPUS = {
    "a100-40": GPUPreset("NVIDIA A100 SXM4 data sheet", 39.4, 312.0, 19.5, 1.555, 300.0),
    "a100-80": GPUPreset("NVIDIA A100 SXM4 data sheet", 79.2, 312.0, 19.5, 2.039, 300.0),
    "h100": GPUPreset("NVIDIA H100 SXM5 data sheet", 79.1, 989.0, 67.0, 3.35, 450.0),
    # One of its two dies, which is one device for Slurm and torch.
    "mi250x": GPUPreset("AMD Instinct MI250X data sheet, one die", 63.9, 191.5, 47.9, 1.6, 50.0),
}
# Source, and line rate of one adapter in GB/s, one direction.
NETWORKS = {
    "hdr200": ("NVIDIA ConnectX-6 data sheet", 25.0),
    "slingshot11": ("HPE Slingshot interconnect data sheet", 25.0),
}
CLUSTERS = {
    "horeka": ClusterPreset("a100-40", "hdr200", 4, 2),  # NHR@KIT documentation, HoreKa hardware overview
    "juwels_booster": ClusterPreset("a100-40", "hdr200", 4, 4),  # JSC, JUWELS configuration
    "perlmutter": ClusterPreset("a100-40", "slingshot11", 4, 4),  # NERSC documentation, Perlmutter
    "lumi": ClusterPreset("mi250x", "slingshot11", 8, 4),  # LUMI documentation, LUMI-G
}


def cluster(name: str) -> ClusterPreset:
    """A cluster's preset; raises UnknownNameError."""
    preset = CLUSTERS.get(name.replace("-", "_"))
    if preset is None:
        raise UnknownNameError("site", name, CLUSTERS)
    return preset


def gpu_machine(site: ClusterPreset) -> Machine:
    """A cluster's nodes and network; every figure stated, none measured. Raises UnknownNameError for its GPU."""
    if site.gpu not in GPUS:
        raise UnknownNameError("GPU", site.gpu, GPUS)
    preset, (network_source, gb_per_s) = GPUS[site.gpu], NETWORKS[site.network]
    half, full = EFFICIENCY * preset.bf16 * 1e12, EFFICIENCY * preset.fp32 * 1e12
    return Machine(
        speeds=f"stated: {site.gpu} ({preset.source})",
        links=f"stated: {site.network} ({network_source}; latency: NCCL src/graph/tuning.cc)",
        assumed=f"a run reaches {EFFICIENCY:.0%} of the GPU's FLOP/s, an SVD {SVD_SHARE:.0%} of those in fp32, "
        f"collectives {LINK_EFFICIENCY:.0%} of the bandwidth; {OVERLAP:.0%} of the backward pass hides messages",
        memory_gib=preset.memory_gib,
        flops={"bfloat16": half, "float16": half, "float32": full, "float64": full},
        bytes_per_s=LINK_EFFICIENCY * preset.tb_per_s * 1e12,
        launch_s=LAUNCH_S,
        svd_flops=SVD_SHARE * preset.fp32 * 1e12,
        overlap=OVERLAP,
        inside=Link(NVLINK_HOP_S, LINK_EFFICIENCY * preset.peer_gb_per_s * 1e9),
        between=Link(NETWORK_HOP_S, LINK_EFFICIENCY * gb_per_s * 1e9),
        adapters=site.adapters,
    )


def this_machine(calibration: str | Path | None = None) -> Machine:
    """The machine at hand: its speeds measured now, or read with its links from a result of ``benchmarks.comm``.

    Raises DataError if ``calibration`` is no such file.
    """
    if calibration is None:
        content = {"device": measured_speeds(), "sharing": {}, "rows": [], "backend": "gloo"}
        return machine_of(content, "just now")
    try:
        content = json.loads(Path(calibration).read_text(encoding="utf-8"))
        if not content["rows"]:
            raise KeyError("rows")
        return machine_of(content, str(calibration))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{calibration} is not a result of python -m benchmarks.comm ({type(error).__name__}: {error}). "
            "Make one: python -m benchmarks.comm --out FILE"
        ) from error


def machine_of(content: Mapping[str, Any], source: str) -> Machine:
    """The machine of a result file's content."""
    device, backend = content["device"], content["backend"]
    measured: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in content["rows"]:
        if row["backend"] == backend:
            key = row["collective"], int(row["processes"])
            measured.setdefault(key, []).append((float(row["bytes"]), float(row["seconds"])))
    links = f"measured: {backend} ({source})"
    if not measured:
        links = f"assumed: {backend} between processes of one machine (python -m benchmarks.comm measures it)"
    # Assumed, where none is measured: gloo over the loopback device.
    loopback = Link(1.5e-4, 1e9)
    return Machine(
        speeds=f"measured: {device['cores']} cores ({source})",
        links=links,
        assumed="a run reaches 70% of large products' FLOP/s (--probe measures steps)",
        memory_gib=device["memory_gib"],
        flops={dtype: 0.7 * flops for dtype, flops in device["peak"].items()},
        bytes_per_s=0.8 * device["bandwidth"],
        launch_s=5e-6,
        svd_flops=device["svd_flops"],
        overlap=0.0,
        inside=loopback,
        between=loopback,
        fitted={key: Link.fit(*key, values) for key, values in measured.items()},
        cores=device["cores"],
        sharing={int(processes): value for processes, value in content["sharing"].items()},
    )


def measured_speeds() -> dict[str, Any]:
    """Cores and memory of this machine; FLOP/s of products and SVDs, bytes/s of additions with all threads."""

    def seconds(statement: str, **tensors: torch.Tensor) -> float:
        # Timer's default is one thread.
        timer = Timer(statement, globals={"torch": torch, **tensors}, num_threads=torch.get_num_threads())
        return float(timer.blocked_autorange(min_run_time=0.1).median)

    n = 768
    a, matrix, long = torch.randn(n, n), torch.randn(384, 384), torch.randn(1 << 22)
    return {
        "peak": {
            "float32": 2.0 * n**3 / seconds("a @ a", a=a),
            "bfloat16": 2.0 * n**3 / seconds("a @ a", a=a.bfloat16()),
        },
        "bandwidth": 3.0 * long.nbytes / seconds("torch.add(a, a, out=b)", a=long, b=torch.empty_like(long)),
        "svd_flops": svd_cost(384, 384) / seconds("torch.linalg.svd(a)", a=matrix),
        "cores": usable_cores(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB,
    }
