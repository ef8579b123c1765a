"""What a run writes down and shows, on the main process; the others only take part in sums."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from hpc_oialr.distributed import MetricsChannel
from hpc_oialr.lowrank import dense_parameters, trainable_parameters
from hpc_oialr.method.report import UpdateReport
from hpc_oialr.record import MemoryMeter, MetricsWriter, RunFolder, Status, Throughput, make_progress
from hpc_oialr.record.energy import EnergyMeter
from hpc_oialr.record.update_metrics import SharedUpdate
from hpc_oialr.train.exchange import UpdateExchange
from hpc_oialr.train.probes import Probes
from hpc_oialr.train.run_context import RunContext
from hpc_oialr.train.spectra_record import SpectraRecord
from hpc_oialr.train.tensorboard import TensorBoard
from hpc_oialr.train.timers import Timers

GIB = 1024**3


class Recorder:
    """Writes ``metrics.jsonl``, ``updates.jsonl`` and ``spectra.h5``, measures memory, and shows progress.

    Parameters
    ----------
    folder
        The run's.
    context
        What is run.
    channel
        What carries the numbers of an update to the main process.
    attributes
        Of ``spectra.h5``.
    deadline
        Unix time of the job's end (s), if it has one.
    """

    def __init__(
        self,
        folder: RunFolder,
        context: RunContext,
        channel: MetricsChannel,
        attributes: dict[str, Any],
        *,
        deadline: float | None = None,
    ) -> None:
        self.deadline = deadline
        self.context, self.every = context, context.config.record.every
        self.folder = folder
        main = context.world.is_main
        self.exchange = UpdateExchange(channel, context.world)
        self.metrics = MetricsWriter(folder.metrics) if main else None
        self.updates = MetricsWriter(folder.updates) if main else None
        self.spectra = SpectraRecord(folder, context, attributes)
        self.energy = EnergyMeter(context.world.device, first_of_node=context.world.local_rank == 0)
        self.progress, self.throughput = make_progress(show=main), Throughput()
        self.meter = MemoryMeter(
            lambda: (context.controller.model, context.optimizer, *context.engine.extra_tensors()),
            context.world.device,
            processes=context.world.size,
        )
        self.board: TensorBoard | None = None
        self._evaluation: dict[str, Any] = {}

    def begin(self, step: int) -> None:
        """Go on after ``step`` steps; records of later ones, of a run that was killed, are dropped."""
        for writer in (self.metrics, self.updates):
            if writer is not None:
                writer.truncate_after(step)
        self.spectra.begin(step)
        if self.metrics is not None and self.context.config.record.tensorboard:
            self.board = TensorBoard(self.folder.logs, step)
        self.probes = Probes(self.context.config.oialr, step)
        with self.meter.probe():
            # The profiler takes a second to load: not in the first step.
            self.throughput.restart()

    def probe(self, step: int) -> AbstractContextManager[None]:
        """Around the step after ``step`` steps: measure its memory if it may reach a new height."""
        return self.meter.probe() if self.probes.due(step) else nullcontext()

    def step(self, step: int, loss: Tensor, waited_s: float, timers: Timers) -> None:
        """After step number ``step``; a collective call at those that are written down."""
        self.throughput.tick(self.context.units_per_step, waited_s)
        if step % self.every == 0 or step == self.context.total_steps:
            own = torch.stack([loss.double(), loss.new_tensor(self.energy.since_last(), dtype=torch.float64)])
            total, joules = self.context.world.all_reduce(own).tolist()
            self._write_step(step, total / self.context.world.size, joules, timers)

    def _write_step(self, step: int, loss: float, joules: float, timers: Timers) -> None:
        if self.metrics is None:
            return
        context, module = self.context, self.context.module
        trained = trainable_parameters(module)
        share = trained / dense_parameters(module)
        unit = context.config.task.unit
        row = {
            "step": step,
            "total_steps": context.total_steps,
            "loss": loss,
            "lr": context.rates.current,
            "wall_s": timers.wall,
            "data_wait_s": timers.seconds["data_wait"],
            "trained_share": share,
            f"{unit}_per_s": self.throughput.items_per_s,
        }
        self._write(row)
        own = {"trained_parameters": trained, "memory_bytes": self.meter.peak_bytes, "energy_J": joules}
        self.spectra.add_steps(row, timers, **own)
        status = Status(
            step=step,
            total_steps=context.total_steps,
            phase="low-rank" if context.controller.r else "full-rank",
            loss=loss,
            trained_share=share,
            rate=self.throughput.items_per_s,
            unit=unit,
            data_wait_share=self.throughput.data_wait_share,
            memory_bytes=self.meter.peak_bytes,
            eta_s=self.throughput.eta_s(context.total_steps - step),
            left_s=None if self.deadline is None else self.deadline - time.time(),
            **self._evaluation,
        )
        self.progress.update(status)

    def _write(self, row: dict[str, Any]) -> None:
        for writer in (self.metrics, self.board):
            if writer is not None:
                writer.write(row)

    def update(self, report: UpdateReport) -> None:
        """What the method did; a collective call. It is written down by :meth:`collect`."""
        for event in report.all:
            self.probes.saw(event)
        self.exchange.start(report)

    def collect(self) -> None:
        """Write down what :meth:`update` was given last, as all processes saw it; a collective call.

        After the next step's backward pass, so that the exchange goes on beside it.
        """
        for shared in self.exchange.collect():
            self._collected(shared)

    def _collected(self, shared: SharedUpdate) -> None:
        self.spectra.write(shared.report)
        if self.updates is None:
            return
        row = shared.row()
        self.updates.write(row)
        if self.board is not None:
            self.board.write({"split": "update", **row})
        if shared.report.kind != "stability":
            self.progress.note(_note(shared))

    def flush(self) -> None:
        """:meth:`collect`, and see to it that all of the record is on the disk, as it must be at a checkpoint."""
        self.collect()
        self.spectra.flush()

    def evaluation(self, step: int, wall_s: float, row: dict[str, Any]) -> None:
        """Metrics of an evaluation after ``step`` steps."""
        self.throughput.restart()
        if self.metrics is None:
            return
        self._write({"step": step, "wall_s": wall_s, **row})
        self._evaluation = {"metric": row["metric"], "metric_name": row["metric_name"]}
        self.progress.note(
            f"step {step}: {row['metric_name']} {row['metric']:.4f}, {wall_s:.1f} s of training"
        )

    def note(self, text: str) -> None:
        """Show one line that stays."""
        self.progress.note(text)

    def peak_memory_gib(self, before: float) -> float:
        """Highest so far, and at least ``before`` (GiB)."""
        return max(before, self.meter.peak_bytes / GIB)

    def finish(self) -> None:
        """Make the record of a run that has come to its end one file."""
        self.spectra.finish()

    def close(self) -> None:
        """Close the files and leave the terminal as it was."""
        self.progress.close()
        self.spectra.close()
        for writer in (self.metrics, self.updates, self.board):
            if writer is not None:
                writer.close()


def _note(shared: SharedUpdate) -> str:
    """One line of progress."""
    report, times = shared.report, shared.update_s
    values = sorted(layer.r for layer in report.layers)
    spread = f"r from {values[0]} to {values[-1]}" if values else "no layer"
    many = f", {min(times):.2f} s on the fastest of {len(times)} processes" if len(times) > 1 else ""
    return (
        f"step {report.t}: {report.kind} of {len(values)} layers, {spread}, {max(times):.2f} s{many}, "
        f"SVDs {shared.svd_s:.2f} s"
    )
