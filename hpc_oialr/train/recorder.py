"""What a run writes and shows; rank 0 writes, the other ranks contribute to the sums."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hpc_oialr.distributed import MetricsChannel
from hpc_oialr.distributed.metric_reduction import PendingReduction
from hpc_oialr.lowrank import dense_parameters, trainable_parameters
from hpc_oialr.method.report import UpdateReport
from hpc_oialr.record import MemoryMeter, MetricsWriter, RunFolder, Status, Throughput, make_progress
from hpc_oialr.record.energy import EnergyMeter
from hpc_oialr.record.trackers import RunTracker, require_tracker
from hpc_oialr.record.update_metrics import SharedUpdate, pack, unpack
from hpc_oialr.spectra.store import Chain
from hpc_oialr.spectra.writer import SpectraWriter
from hpc_oialr.train.load_config import flat
from hpc_oialr.train.pace import OwnTime
from hpc_oialr.train.profiling import StepProfiler
from hpc_oialr.train.run_context import RunContext
from hpc_oialr.train.timing import Timers
from hpc_oialr.train.utilisation import Utilisation


class Recorder:
    """Writes ``metrics.jsonl``, ``updates.jsonl`` and ``spectra.h5``, measures memory, shows progress.

    All ranks make the same calls. ``channel`` reduces the numbers of an update, ``attributes`` are those of
    ``spectra.h5``, ``deadline`` is the Unix time of the job's end (s).
    """

    def __init__(
        self,
        folder: RunFolder,
        context: RunContext,
        channel: MetricsChannel,
        attributes: Mapping[str, Any],
        *,
        deadline: float | None = None,
    ) -> None:
        self.folder, self.context, self.channel, self.deadline = folder, context, channel, deadline
        world, config = context.world, context.config.record
        self.metrics = MetricsWriter(folder.metrics) if world.is_main else None
        self.updates = MetricsWriter(folder.updates) if world.is_main else None
        self.tracker: RunTracker | None = None
        self._settings = flat(attributes["config"])
        if config.tracker is not None:
            require_tracker(config.tracker)
        self.spectra: SpectraWriter | None = None
        if config.spectra is not False and world.is_main:
            chain = Chain(folder.spectra, attributes)
            self.spectra = SpectraWriter(chain, context.controller.layers, queue_length=config.spectra_queue)
        self.energy = EnergyMeter(world.device, first_of_node=world.local_rank == 0)
        self.progress, self.throughput = make_progress(show=world.is_main), Throughput()
        self.utilisation = Utilisation(context.config, world.device)
        train = context.config.train
        traced = train.profile if world.rank in train.profile_ranks else None
        self.own_time = OwnTime(world, context.engine)
        self.profiler = StepProfiler(traced, folder.profile, world.rank)
        self.meter = MemoryMeter(
            lambda: (
                context.controller.model,
                context.optimizer,
                *context.engine.extra_tensors(),
                *context.controller.gathered,
            ),
            world.device,
            processes=world.size,
        )
        self._under_way: list[tuple[UpdateReport, PendingReduction]] = []
        self._evaluation: dict[str, Any] = {}

    def begin(self, step: int) -> None:
        """Continue after ``step`` steps; drop what a killed run recorded of later ones."""
        for writer in (self.metrics, self.updates, self.spectra):
            if writer is not None:
                writer.truncate_after(step)
        config = self.context.config.record
        if self.metrics is not None and config.tracker is not None:
            self.tracker = RunTracker(config.tracker, self.folder, self._settings, project=config.project, step=step)
        self._first = step
        with self.meter.probe():
            # The profiler takes a second to load: not in the first step.
            self.throughput.restart()

    def probe(self, step: int) -> AbstractContextManager[None]:
        """Around the step after ``step`` steps: measures its memory if that may be the highest so far.

        The first two steps (the optimizer's state exists from the second on), also of every phase in which bases are
        trained, and the steps of the method's first conversion and update and the ones after them. Later updates work
        on smaller factors.
        """
        method, steps = self.context.config.oialr, [self._first, self._first + 1]
        if method is not None:
            events = [int(method.delay), int(method.delay + method.frequency)]
            events += [int(max(start, method.delay)) + 1 for start, _ in method.free_phases]
            every = method.stability_frequency if method.stability_threshold is not None else None
            if every is not None and step >= method.delay:
                events += [t for t in (step, step + 1) if t % every == 0]
            steps += [t + after for t in events for after in (-1, 0)]
        return self.meter.probe() if step in steps and not self.profiler.on else nullcontext()

    def step(self, step: int, loss: Tensor, waited_s: float, timers: Timers) -> None:
        """Record step number ``step``; a collective call every ``record.every`` steps and at the end."""
        context, world = self.context, self.context.world
        self.throughput.tick(context.units_per_step, waited_s)
        self.profiler.step()
        if step % context.config.record.every and step != context.total_steps:
            return
        own = torch.stack([loss.double(), loss.new_tensor(self.energy.since_last(), dtype=torch.float64)])
        if self.own_time.on:
            # Each rank's own time travels in a slot of its own.
            times = own.new_zeros(world.size)
            times[world.rank] = self.own_time.since_last()
            own = torch.cat([own, times])
        total, joules, *times_s = world.all_reduce(own).tolist()
        if self.metrics is None:
            return
        trained, memory = trainable_parameters(context.module), self.meter.peak_bytes
        unit, seconds = context.config.task.unit, timers.seconds
        row: dict[str, Any] = {
            "step": step,
            "total_steps": context.total_steps,
            "loss": total / world.size,
            "lr": context.rates.current,
            "wall_s": timers.wall,
            "data_wait_s": seconds["data_wait"],
            "trained_share": trained / dense_parameters(context.module),
            f"{unit}_per_s": self.throughput.items_per_s,
        }
        row |= self.own_time.row(times_s)
        if self.mfu is not None:
            row["mfu"] = self.mfu
        if math.isfinite(joules):
            row["energy_J"] = joules
        self._write(row)
        if self.spectra is not None:
            fields = {name: row[name] for name in ("step", "loss", "lr", "wall_s", "data_wait_s")}
            fields |= {f"{name}_s": seconds[name] for name in ("update", "eval", "checkpoint")}
            fields |= {"trained_parameters": trained, "memory_bytes": memory, "energy_J": joules}
            self.spectra.add_steps(fields)
        status = Status(
            step=step,
            total_steps=context.total_steps,
            phase="low-rank" if context.controller.r else "full-rank",
            loss=row["loss"],
            trained_share=row["trained_share"],
            rate=self.throughput.items_per_s,
            mfu=self.mfu,
            unit=unit,
            data_wait_share=self.throughput.data_wait_share,
            memory_bytes=memory,
            eta_s=self.throughput.eta_s(context.total_steps - step),
            left_s=None if self.deadline is None else self.deadline - time.time(),
            slowest_rank=row.get("slowest_rank"),
            slowest_ratio=row.get("slowest_ratio", 1.0),
            **self._evaluation,
        )
        self.progress.update(status)

    def _write(self, row: dict[str, Any]) -> None:
        for writer in (self.metrics, self.tracker):
            if writer is not None:
                writer.write(row)

    def update(self, report: UpdateReport) -> None:
        """Start the reduction of what the method did in a step; a collective call. :meth:`collect` writes it."""
        assert not self._under_way
        rank, size = self.context.world.rank, self.context.world.size
        self._under_way = [(event, self.channel.start(pack(event, rank, size))) for event in report.all]

    def collect(self) -> None:
        """Write what :meth:`update` reduced; a collective call.

        Called after the next step's backward pass, with which the reduction overlaps.
        """
        events, self._under_way = self._under_way, []
        for event, pending in events:
            shared = unpack(event, pending.result())
            if self.spectra is not None:
                self.spectra.write(shared.report)
            if self.updates is not None:
                row = shared.row()
                self.updates.write(row)
                if self.tracker is not None:
                    self.tracker.update(row, shared.report)
                if event.kind != "stability":
                    self.progress.note(_note(shared))

    def flush(self, checkpoint: int | None = None) -> bool:
        """Write all of the record to disk before a checkpoint; False if spectra had to stay in memory.

        A collective call. With the step of a ``checkpoint`` that was written in spite of that: rank 0 alone tries again,
        and warns if it fails.
        """
        if checkpoint is None:
            self.collect()
        return self.spectra is None or self.spectra.flush(checkpoint)

    def evaluation(self, step: int, wall_s: float, row: dict[str, Any]) -> None:
        """Metrics of an evaluation after ``step`` steps."""
        self.throughput.restart()
        if self.metrics is None:
            return
        self._write({"step": step, "wall_s": wall_s, **row})
        self._evaluation = {"metric": row["metric"], "metric_name": row["metric_name"]}
        self.progress.note(f"step {step}: {row['metric_name']} {row['metric']:.4f}, {wall_s:.1f} s of training")

    @property
    def mfu(self) -> float | None:
        """Of the last steps; None where the device's peak is unknown."""
        return self.utilisation.mfu(self.throughput.items_per_s / self.context.units_per_step)

    def peak_memory_gib(self, before: float) -> float:
        """Highest so far, at least ``before`` (GiB)."""
        return max(before, self.meter.peak_bytes / 1024**3)

    def finish(self) -> None:
        """Join the spectra of a finished run into one file."""
        if self.spectra is not None:
            self.spectra.finish()

    def close(self) -> None:
        """Close the files and restore the terminal, also after an error."""
        for each in (self.profiler, self.progress, self.spectra, self.metrics, self.updates, self.tracker):
            if each is not None:
                each.close()


def _note(shared: SharedUpdate) -> str:
    """One line of progress."""
    report, times = shared.report, shared.update_s
    values = sorted(layer.r for layer in report.layers)
    spread = f"r from {values[0]} to {values[-1]}" if values else "no layer"
    many = f", {min(times):.2f} s on the fastest of {len(times)} ranks" if len(times) > 1 else ""
    return (
        f"step {report.t}: {report.kind} of {len(values)} layers, {spread}, {max(times):.2f} s{many}, "
        f"SVDs {shared.svd_s:.2f} s"
    )
