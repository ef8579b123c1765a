"""Time of a step and of an SVD event: that of one process, and its messages over the links.

The time of one process is measured (``oialr plan --probe``) or counted operations over the machine's speeds, which
are measured or stated. A collective of n bytes among P processes takes ``passes (ceil(log2 P) latency + (P-1)/P n /
bandwidth)``, two passes for an all-reduce, one for all others: what recursive halving and doubling takes (Thakur,
Rabenseifner and Gropp, Int. J. High Perform. Comput. Appl. 19, 2005), and NCCL's rings and trees at best.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer

from hpc_oialr.distributed.environment import usable_cores
from hpc_oialr.engines import EngineConfig, TensorParallel
from hpc_oialr.errors import DataError
from hpc_oialr.linalg.work_plan import LayerWork, svd_cost, svd_rounds
from hpc_oialr.plan.deployment import Deployment
from hpc_oialr.plan.schedule import LayerShape, Phase
from hpc_oialr.plan.trace_step import Step
from hpc_oialr.plan.tracer import Message, Trace

GIB = 1024**3
# Of forward and backward pass, the part of the backward pass, during which gradients can be sent.
BACKWARD_SHARE = 2 / 3


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
        """The link that explains measured (bytes, seconds) best: least squares of relative errors."""
        latencies, share = _coefficients(collective, processes)
        rows = np.array([(latencies / seconds, share * size / seconds) for size, seconds in measured])
        latency, inverse = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
        if latency < 0 or inverse < 0:
            # Neither can be: the other one alone.
            kept = rows[:, 1] if latency < 0 else rows[:, 0]
            only = float(kept.sum() / np.square(kept).sum())
            latency, inverse = (0.0, only) if latency < 0 else (only, 0.0)
        return cls(float(latency), 1.0 / float(inverse) if inverse else math.inf)


def _coefficients(collective: str, processes: int) -> tuple[float, float]:
    """Latencies, and parts of the whole tensor, that a collective takes one after another."""
    passes = 2 if collective == "all_reduce" else 1
    return passes * math.ceil(math.log2(processes)), passes * (processes - 1) / processes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What processes compute on and send over.

    Attributes
    ----------
    speeds, links, assumed
        Where the figures are from, for the user: "measured: ...", "stated: ...", and what had to be assumed.
    memory_gib
        Of a GPU, or of a node on CPUs.
    flops, bytes_per_s, launch_s, svd_flops
        Speeds a run reaches: FLOP/s of matrix products by dtype, bytes/s of other operations, seconds to launch an
        operation, FLOP/s of SVDs; of one GPU, or of all cores of a node.
    overlap
        Share of the backward pass during which gradients are sent.
    inside, between
        Links of two processes of a node, and of one network adapter.
    adapters
        Of a node, shared by its processes.
    fitted
        Measured links by collective and number of processes; preferred to ``inside`` and ``between``.
    cores
        Of a node where processes share them; 0 for GPUs.
    sharing
        Measured: how much slower a process is where so many of a node compute at once, each with its cores.
    """

    speeds: str
    links: str
    assumed: str
    memory_gib: float
    flops: Mapping[str, float]
    bytes_per_s: float
    launch_s: float
    svd_flops: float
    overlap: float
    inside: Link
    between: Link
    adapters: int = 1
    fitted: Mapping[tuple[str, int], Link] = field(default_factory=dict)
    cores: int = 0
    sharing: Mapping[int, float] = field(default_factory=dict)

    def memory_of_process_gib(self, per_node: int) -> float:
        """What one of ``per_node`` processes may use."""
        return self.memory_gib / per_node if self.cores else self.memory_gib

    def threads(self, per_node: int) -> int:
        """Of one process."""
        return max(1, self.cores // per_node)

    def speed(self, per_node: int) -> float:
        """Speed of one of ``per_node`` processes, relative to one that has the whole node."""
        return self.threads(per_node) / self.cores / self.slowdown(per_node) if self.cores else 1.0

    def slowdown(self, per_node: int) -> float:
        """Of a process with its own cores, by the others of its node; beyond the measured in proportion."""
        if not self.cores or per_node == 1:
            return 1.0
        known = {1: 1.0, **self.sharing}
        below = max(p for p in known if p <= per_node)
        return known[below] * max(1.0, per_node / max(below, self.cores))

    def messages_s(self, messages: Iterable[Message], d: Deployment) -> float:
        """Messages one after another."""
        return sum(self.link(m, d).seconds(m.collective, m.size, m.processes) for m in messages)

    def link(self, message: Message, d: Deployment) -> Link:
        """The slowest link a message goes over; between nodes the members on a node use its adapters together."""
        measured = [p for collective, p in self.fitted if collective == message.collective]
        if measured:
            nearest = min(measured, key=lambda p: abs(math.log(p / message.processes)))
            return self.fitted[message.collective, nearest]
        if (message.processes - 1) * message.stride < d.per_node:
            return self.inside
        # As many groups have members on the same nodes, and share their adapters.
        wire = self.between.bytes_per_s * self.adapters / min(message.stride, d.per_node)
        alone = message.stride >= d.per_node
        return Link(self.between.latency_s, wire if alone else min(self.inside.bytes_per_s, wire))


def step_time(
    step: Step,
    sent: Sequence[Message],
    engine: EngineConfig,
    d: Deployment,
    machine: Machine,
    measured_s: float | None = None,
) -> tuple[float, float]:
    """Seconds of computing, and of waiting for messages, of a step.

    Parameters
    ----------
    measured_s
        Time of the same step on one process alone, with the cores it has in ``d``; preferred to counted operations.
    """
    if measured_s is None:
        passes_s = _counted_s(step.passes, machine, d)
        compute_s = passes_s + _counted_s(step.update, machine, d)
    else:
        passes_s = compute_s = measured_s * machine.slowdown(d.per_node)
    # Activations of tensor parallelism must arrive before the next layer; gradients may be sent meanwhile.
    tensor = engine.size if isinstance(engine, TensorParallel) else 0
    blocking = [m for m in sent if tensor and m.stride == 1 and m.processes == tensor]
    beside_s = machine.messages_s([m for m in sent if m not in blocking], d)
    hidden_s = machine.overlap * BACKWARD_SHARE * passes_s
    return compute_s, machine.messages_s(blocking, d) + max(0.0, beside_s - hidden_s)


def _counted_s(trace: Trace, machine: Machine, d: Deployment) -> float:
    slowest = min(machine.flops.values())
    products_s = sum(n / machine.flops.get(dtype, slowest) for dtype, n in trace.flops.items())
    busy_s = (products_s + trace.moved / machine.bytes_per_s) / machine.speed(d.per_node)
    return max(busy_s, len(trace.live) * machine.launch_s)


def svd_seconds(
    phase: Phase, shapes: Mapping[str, LayerShape], d: Deployment, machine: Machine, *, sharded: bool
) -> float:
    """Time of an event's SVDs, until the last process has finished.

    Parameters
    ----------
    sharded
        Whether all processes work on each weight, one after another (TSQR). Otherwise, and for the r x r matrices of
        an update, they are distributed by cost.
    """
    sizes = [(r, r) for r in phase.before.values()]
    if phase.event == "conversion":
        sizes = [(shapes[name].m, shapes[name].n) for name in phase.before]
    if sharded and phase.event == "conversion":
        flops = sum(svd_cost(m, n, d.processes) for m, n in sizes)
    else:
        rounds = svd_rounds([LayerWork("", m, n) for m, n in sizes], d.processes)
        flops = sum(max(task.load for task in tasks) for tasks in rounds)
    return flops / (machine.svd_flops * machine.speed(d.per_node))


# -- this machine --------------------------------------------------------------------------------------


def this_machine(calibration: str | Path | None = None) -> Machine:
    """The machine at hand: its speeds measured for a moment, or, with its network, by ``python -m benchmarks.comm``.

    Raises
    ------
    DataError
        If ``calibration`` is not a result file of that benchmark.
    """
    if calibration is None:
        return machine_of(
            {"device": measured_speeds(), "sharing": {}, "rows": [], "backend": "gloo"}, "just now"
        )
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
        # Assumed, where none is measured: gloo over the loopback device.
        inside=Link(1.5e-4, 1e9),
        between=Link(1.5e-4, 1e9),
        fitted={key: Link.fit(*key, values) for key, values in measured.items()},
        cores=device["cores"],
        sharing={int(processes): value for processes, value in content["sharing"].items()},
    )


def measured_speeds() -> dict[str, Any]:
    """Cores and memory of this machine; FLOP/s of products and SVDs, bytes/s of additions with all threads."""

    def seconds(statement: str, **tensors: torch.Tensor) -> float:
        # By itself it takes one thread.
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
