"""Collectives between processes of this machine, and how processes slow each other down; what `oialr plan` needs.

All-reduce, all-gather, reduce-scatter and broadcast over sizes, on 2 and 4 processes, by gloo, by NCCL where there
are as many GPUs, and MPI's Allreduce where mpi4py and mpirun are there. Latency and bandwidth, as in
`hpc_oialr/plan/machine.py`, are fitted to each and printed; `mean_error` is what is left.

`sharing`: time of a training step of one transformer layer, in P processes at once, over its time in one of them
alone, each with its share of the cores as threads, in turn in one run. With 4 processes on 2 cores it holds what the
system's scheduler makes of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.common import Row, arguments, finish
from benchmarks.processes import on_processes
from hpc_oialr.distributed import World
from hpc_oialr.errors import MissingExtraError
from hpc_oialr.plan.machine import Link, measured_speeds

SIZES = (4, 1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22, 1 << 24)
PROCESSES = (2, 4)
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast")


def start(collective: str, whole: Tensor, size: int) -> Callable[[], object]:
    """One collective over a tensor of the given size in all."""
    if collective == "all_reduce":
        return lambda: dist.all_reduce(whole)
    if collective == "broadcast":
        return lambda: dist.broadcast(whole, 0)
    part = whole.new_empty(whole.numel() // size)
    if collective == "all_gather":
        parts = list(whole.chunk(size))
        return lambda: dist.all_gather(parts, part)
    return lambda: dist.reduce_scatter(part, list(whole.chunk(size)))


def timed(function: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call that all processes make together."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        begin = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def collectives(backend: str, repeats: int) -> Row:
    """Seconds of every collective and size, on this process."""
    device = "cuda" if backend == "nccl" else "cpu"
    world = World.from_environment(device=device, timeout_s=300)
    found = {}
    for name in COLLECTIVES:
        for size in SIZES:
            numbers = max(world.size, size // 4 // world.size * world.size)
            call = start(name, torch.ones(numbers, device=device), world.size)
            found[f"{name} {4 * numbers}"] = timed(call, repeats if size < 1 << 22 else max(3, repeats // 3))
    return found


def sharing(cores: int, repeats: int) -> Row:
    """How much longer a step takes with all processes at once; every process takes part."""
    world = World.from_environment(device="cpu", timeout_s=300)
    torch.set_num_threads(max(1, cores // world.size))
    step = layer_step()
    ratios = []
    for _ in range(repeats + 1):
        dist.barrier()
        alone = seconds(step) if world.rank == 0 else 0.0
        dist.barrier()
        together = torch.tensor([seconds(step)])
        dist.all_reduce(together, dist.ReduceOp.MAX)
        ratios.append(float(together) / alone if alone else 0.0)
    return {"slowdown": statistics.median(ratios[1:])}


def layer_step() -> Callable[[], object]:
    """Forward and backward pass of a transformer layer."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    x = torch.randn(16, 64, 256)
    return lambda: layer(x).sum().backward()


def seconds(step: Callable[[], object], times: int = 6) -> float:
    """Of some steps in a row."""
    begin = time.perf_counter()
    for _ in range(times):
        step()
    return time.perf_counter() - begin


# -- MPI -----------------------------------------------------------------------------------------------


def mpi_child(out: Path, repeats: int) -> None:
    """What mpirun starts: Allreduce over all sizes; process 0 writes."""
    from mpi4py import MPI

    comm, found = MPI.COMM_WORLD, {}
    for size in SIZES:
        tensor = torch.ones(size // 4)
        times = []
        for _ in range(repeats + 1):
            comm.Barrier()
            begin = time.perf_counter()
            comm.Allreduce(MPI.IN_PLACE, tensor.numpy())
            times.append(time.perf_counter() - begin)
        found[f"all_reduce {size}"] = statistics.median(times[1:])
    if comm.rank == 0:
        out.write_text(json.dumps(found))


def mpi(processes: int, repeats: int) -> Row | None:
    """The same in processes of mpirun; None where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "mpi.json"
        launch = ["mpirun", "--oversubscribe", "--mca", "mpi_yield_when_idle", "1", "-n", str(processes)]
        child = ["-m", "benchmarks.comm", "--mpi-child", str(out), "--repeats", str(repeats)]
        try:
            subprocess.run([*launch, sys.executable, *child], check=True, timeout=300, env=mpi_environment())
        except (OSError, subprocess.SubprocessError) as error:
            print(f"no MPI: {error}. {MissingExtraError('mpi4py', 'mpi', purpose='MPI')}")
            return None
        found: Row = json.loads(out.read_text())
        return found


def mpi_environment() -> dict[str, str]:
    """This one's, and leave for root."""
    more = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **more}


# -- all of it -----------------------------------------------------------------------------------------


def rows_of(backend: str, processes: int, found: Row) -> list[Row]:
    """One row for each collective and size."""
    rows = []
    for key, value in found.items():
        collective, size = key.split()
        place = {"backend": backend, "collective": collective, "processes": processes}
        rows.append({**place, "bytes": int(size), "seconds": value})
    return rows


def fits_of(rows: Sequence[Row]) -> list[Row]:
    """A link for each backend, collective and number of processes."""
    found = []
    for key in dict.fromkeys((row["backend"], row["collective"], row["processes"]) for row in rows):
        backend, collective, processes = key
        measured = [(r["bytes"], r["seconds"]) for r in rows if (r["backend"], r["collective"], r["processes"]) == key]
        link = Link.fit(collective, processes, measured)
        errors = [abs(link.seconds(collective, size, processes) / s - 1) for size, s in measured]
        found.append(
            {
                "backend": backend,
                "collective": collective,
                "processes": processes,
                "latency_s": link.latency_s,
                "gb_per_s": link.bytes_per_s / 1e9,
                "mean_error": statistics.mean(errors),
            }
        )
    return found


def measure(backend: str, repeats: int, *, with_mpi: bool = True) -> dict[str, Any]:
    """Everything that goes into the result file."""
    cores = len(os.sched_getaffinity(0))
    rows: list[Row] = []
    for processes in PROCESSES:
        rows += rows_of(backend, processes, slowest(on_processes(processes, collectives, backend, repeats)))
        found = mpi(processes, repeats) if with_mpi else None
        rows += rows_of("mpi", processes, found or {})
    slowdowns = {"1": 1.0}
    for processes in PROCESSES:
        slowdowns[str(processes)] = on_processes(processes, sharing, cores, repeats)[0]["slowdown"]
    torch.set_num_threads(cores)
    return {"rows": rows, "backend": backend, "sharing": slowdowns, "device": measured_speeds()}


def slowest(found: Sequence[Row]) -> Row:
    """Of each figure the largest of any process."""
    return {key: max(row[key] for row in found) for key in found[0]}


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=15)
    default = "nccl" if torch.cuda.device_count() >= max(PROCESSES) else "gloo"
    parser.add_argument("--backend", choices=("gloo", "nccl"), default=default)
    parser.add_argument("--mpi-child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mpi_child:
        mpi_child(options.mpi_child, options.repeats)
        return
    found = measure(options.backend, options.repeats)
    rows = found.pop("rows")
    finish(fits_of(rows), None)
    print("sharing:", found["sharing"])
    finish(rows, options.out, **found)


if __name__ == "__main__":
    main()
