"""`oialr plan` against measurement: memory and time of a step, three recipes on 1, 2 and 4 processes of this machine.

Predicted memory is the plan's. Predicted time is that of a step of one process alone, with its share of the batch
and of the cores as threads (the plan's probe), times what P processes at once slow each other down (measured by
another program: one transformer layer, as in `benchmarks/comm.py`), plus the messages by the fitted latencies and
bandwidths. All processes of all rows are there the whole time and wait; probe, slowdown and measurement are taken in
turn, round by round, so that drifts of the machine's speed meet all of them; `time_ratio` is the median over the
rounds of predicted over measured. Rows without a time are events, of which the memory is compared.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import statistics
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.comm import layer_step, measure, seconds
from benchmarks.common import Row, arguments, finish
from benchmarks.processes import ENGINES, free_port
from hpc_oialr.distributed import World
from hpc_oialr.engines import SingleEngine
from hpc_oialr.plan.machine import Machine, machine_of, this_machine
from hpc_oialr.plan.planner import BEFORE, Planner
from hpc_oialr.plan.schedule import predictable_rule
from hpc_oialr.plan.scripted_run import ScriptedRun
from hpc_oialr.plan.workload import Workload
from hpc_oialr.record import MemoryMeter
from hpc_oialr.train.load_config import load_config

RECIPES = ("fashion_mnist_vit", "text_gpt", "fashion_mnist_convnet")
STAGES = ("dense", "converted", "end")
EVENTS = {"converted": "conversion", "end": "update"}
GIB = 1024**3


# -- one process ---------------------------------------------------------------------------------------


class Worker:
    """What runs in a process: a recipe's phases, step by step as it is told."""

    def __init__(self, recipe: str, engine: str, batch: int) -> None:
        workload = Workload.of(load_config(recipe).config)
        world = World.from_environment(device="cpu", timeout_s=600)
        made = ENGINES[engine]().build(world, "fp32") if world.size > 1 else SingleEngine(world)
        method = workload.config.oialr
        assert method is not None
        rule = predictable_rule(method.rule, 0.25)[0]
        context = workload.run_context(made, batch=batch, rule=rule, fake_data=False)
        self.run = ScriptedRun(context)
        self.context, self.size = self.run.context, world.size
        self.share = layer_step()

    def steps(self, batch: int, threads: int, count: int) -> list[float]:
        """Times of some steps."""
        torch.set_num_threads(threads)
        return [self.run.step(batch) for _ in range(count)]

    def slowdown(self, threads: int) -> float:
        """A step of the layer with all processes at once over one with this process alone; on process 0."""
        torch.set_num_threads(threads)
        if self.size == 1:
            return 1.0
        dist.barrier()
        alone = seconds(self.share) if dist.get_rank() == 0 else 0.0
        dist.barrier()
        together = torch.tensor([seconds(self.share)])
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return float(together) / alone if alone else 0.0

    def memory(self, batch: int) -> float:
        """Most bytes in a step."""
        samples = self.run.samples(batch)
        with self.meter().probe():
            self.run.train(samples)
        return float(self._meter.peak_bytes)

    def event(self, stage: str, batch: int) -> float:
        """Go on to the next stage; most bytes in a step and in its first event after it."""
        self.run.expect("conversion" if stage == "converted" else "update")
        step = self.memory(batch)
        with self.meter().probe():
            self.run.convert() if stage == "converted" else self.run.update()
        if stage == "end":
            self.run.settle(self.run.samples(batch))
        return max(step, float(self._meter.peak_bytes))

    def meter(self) -> MemoryMeter:
        """A new one."""
        context = self.context

        def held() -> Iterator[Any]:
            yield from (context.controller.model, context.optimizer, *context.engine.extra_tensors())
            yield from context.controller.gathered

        self._meter = MemoryMeter(held, "cpu", processes=self.size)
        return self._meter


def serve(pipe: Any, environment: dict[str, str], log: str, *what: Any) -> None:
    """Make a worker and do what is asked for through the pipe."""
    os.environ.update(environment)
    sys.stderr = Path(log).open("w")  # noqa: SIM115
    try:
        worker = Worker(*what)
        pipe.send("ready")
        while (asked := pipe.recv()) is not None:
            name, *args = asked
            pipe.send(getattr(worker, name)(*args))
    except BaseException:
        pipe.send(RuntimeError(traceback.format_exc()))
    # Ending the interpreter under gloo's threads now and then aborts the process.
    os._exit(0)


class Team:
    """Some processes that do the same together."""

    def __init__(self, size: int, folder: str, *what: Any) -> None:
        port, context = str(free_port()), mp.get_context("spawn")
        self.pipes, self.members = [], []
        for rank in range(size):
            here, there = context.Pipe()
            place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
            environment = {key: str(value) for key, value in place.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            log = f"{folder}/{port}-{rank}.log"
            member = context.Process(target=serve, args=(there, environment, log, *what), daemon=True)
            member.start()
            self.pipes.append(here)
            self.members.append(member)

    def answers(self) -> list[Any]:
        """Of all members."""
        found = [pipe.recv() for pipe in self.pipes]
        for answer in found:
            if isinstance(answer, RuntimeError):
                raise answer
        return found

    def ask(self, *asked: Any) -> list[Any]:
        """Let all do something, and wait for it."""
        for pipe in self.pipes:
            pipe.send(asked)
        return self.answers()

    def end(self) -> None:
        """Send all home."""
        for pipe in self.pipes:
            pipe.send(None)
        for member in self.members:
            member.join(20)
            member.kill()


# -- a recipe ------------------------------------------------------------------------------------------


def compare(recipe: str, engine: str, sizes: Sequence[int], machine: Machine, rounds: int) -> list[Row]:
    """All rows of a recipe under an engine."""
    planner = Planner(Workload.of(load_config(recipe).config), machine, machine.memory_gib)
    cores, settings = machine.cores, ENGINES[engine]()
    plans = {size: planner.rows([1], size, settings, advise=False)[0] for size in sizes}
    batches = {size: plans[size]["batch"] for size in sizes}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        teams = {size: Team(size, folder, recipe, engine, batches[size]) for size in sizes}
        probe = Team(1, folder, recipe, engine, max(batches.values()))
        for team in (*teams.values(), probe):
            team.answers()
            # The optimizer makes its state in the first step.
            team.ask("steps", min(batches.values()), 1, 1)
        for stage in STAGES:
            peaks = {size: {} for size in sizes}
            if stage in EVENTS:
                probe.ask("event", stage, min(batches.values()))
                peaks = {s: {EVENTS[stage]: max(teams[s].ask("event", stage, batches[s]))} for s in sizes}
            taken = range(rounds + 1 if rounds else 0)
            times = [round_of(probe, teams, batches, cores, warm=number == 0) for number in taken][1:]
            for size in sizes:
                peaks[size][stage] = max(teams[size].ask("memory", batches[size]))
                key = {"recipe": recipe, "engine": engine, "processes": size}
                rows += rows_of(key, stage, plans[size], peaks[size], [found[size] for found in times])
        for team in (*teams.values(), probe):
            team.end()
    return rows


def round_of(probe: Team, teams: dict[int, Team], batches: dict[int, int], cores: int, *, warm: bool) -> dict[int, Row]:
    """Probe, slowdown and measurement of every number of processes, once."""
    found = {}
    for size, team in teams.items():
        threads, count = max(1, cores // size), 1 if warm else 2
        alone = statistics.mean(probe.ask("steps", batches[size], threads, count)[0])
        slowdown = max(team.ask("slowdown", threads))
        times = team.ask("steps", batches[size], threads, count)
        found[size] = {
            "alone": alone,
            "slowdown": slowdown,
            "measured": max(statistics.mean(t) for t in times),
        }
    return found


def rows_of(key: Row, stage: str, plan: Row, peaks: dict[str, float], times: list[Row]) -> list[Row]:
    """One row for the stage, and one for the event before it."""
    rows = []
    for name, measured in peaks.items():
        event = name != stage
        predicted = plan[f"{name}_peak_gib"]
        if event:
            # Measured with the step before it.
            predicted = max(predicted, plan[f"{BEFORE[name]}_peak_gib"])
        row = {**key, "stage": name, "predicted_gib": predicted, "measured_gib": measured / GIB}
        timed = of_times(plan[f"{name}_waiting_s"], times) if times and not event else {}
        rows.append({**row, "memory_ratio": predicted * GIB / measured, **timed})
    return rows


def of_times(waiting: float, times: list[Row]) -> Row:
    """Predicted and measured time of a step."""
    predicted = [t["alone"] * t["slowdown"] + waiting for t in times]
    return {
        "predicted_ms": 1e3 * statistics.median(predicted),
        "measured_ms": 1e3 * statistics.median(t["measured"] for t in times),
        "time_ratio": statistics.median(p / t["measured"] for p, t in zip(predicted, times, strict=True)),
        "alone_ms": 1e3 * statistics.median(t["alone"] for t in times),
        "slowdown": statistics.median(t["slowdown"] for t in times),
        "messages_ms": 1e3 * waiting,
    }


def main() -> None:
    """Every recipe."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--engines", nargs="+", default=["ddp"], choices=list(ENGINES))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5, help="0: memory only")
    options = parser.parse_args()
    machine = machine_of(measure("gloo", 7, with_mpi=False), "now") if options.rounds else this_machine()
    rows: list[Row] = []
    for recipe in options.recipes:
        for engine in options.engines:
            rows += compare(recipe, engine, options.processes, machine, options.rounds)
            finish(rows, options.out)
    for name in ("memory", "time"):
        errors = [abs(row[f"{name}_ratio"] - 1) for row in rows if f"{name}_ratio" in row]
        if errors:
            print(f"{name}: largest error {max(errors):.1%}, mean {statistics.mean(errors):.1%}")


if __name__ == "__main__":
    main()
