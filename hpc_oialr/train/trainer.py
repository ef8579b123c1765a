"""The training loop: one path for any number of processes, with the method or without it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from hpc_oialr.data import Batch
from hpc_oialr.distributed.world import AsyncFlagReduce
from hpc_oialr.errors import CheckpointError, FolderLostError
from hpc_oialr.torch_compat import graphs_compiled
from hpc_oialr.train import snapshot
from hpc_oialr.train.checkpoint_store import CheckpointStore
from hpc_oialr.train.evaluation import evaluate
from hpc_oialr.train.one_step import forward_backward
from hpc_oialr.train.recorder import Recorder
from hpc_oialr.train.run_context import RunContext
from hpc_oialr.train.snapshot import Progress
from hpc_oialr.train.stopping import Stopping, StopRequest
from hpc_oialr.train.timers import Timers

log = logging.getLogger(__name__)


class Trainer:
    """Takes a run from where it stands to its end.

    Parameters
    ----------
    context
        Model, data and optimizer.
    store
        Where checkpoints go.
    recorder
        What writes and shows the run.
    settings
        Those that may not change; see :mod:`hpc_oialr.train.same_run`.
    stop
        What may end the run early. Once any process wants to stop, all write a checkpoint after the same
        step, the next one, and stop.
    """

    def __init__(
        self,
        context: RunContext,
        store: CheckpointStore,
        recorder: Recorder,
        *,
        settings: Mapping[str, Any],
        stop: StopRequest | None = None,
    ) -> None:
        self.context, self.store, self.recorder = context, store, recorder
        self.settings = settings
        self.stopping = Stopping(stop or StopRequest())
        self._stop_flag = AsyncFlagReduce(context.world)
        self.config = context.config
        self.timers = Timers(context.world.device)
        self.progress = Progress()
        self.first_graphs: int | None = None
        self._trained: list[nn.Parameter] | None = None
        self._evaluation_steps = _spread(self.config.train.evaluations, context.total_steps)
        self._saved: int | None = None
        self._waited_s = 0.0

    def resume(self) -> None:
        """Go on from the last whole checkpoint; from the start if there is none."""
        step = self.store.latest()
        if step is not None:
            self.progress = snapshot.load(self.store, step, self.context, self.timers, self.settings)
            self._saved = step
            self.stopping.saved(self.progress.checkpoint_s)

    def fit(self) -> bool:
        """Train to the end; False if it was stopped on request, True otherwise.

        Raises
        ------
        NonFiniteError
            If a weight that is due for an SVD holds NaN or Inf.
        CheckpointError
            If the last checkpoint cannot be written; without one on the way the training goes on.
        """
        self.recorder.begin(self.progress.step)
        self.context.module.train()
        self.stopping.restart()
        with self.timers.training():
            for batch in self._batches():
                self._step(batch)
                self._evaluate_if_due()
                stop = self._stop_flag.exchange(self.stopping.wanted())
                if stop:
                    break
                self._save_if_due()
            else:
                stop = False
        self._stop_flag.settle()
        self.save()
        if stop:
            self.recorder.note(f"stopped after step {self.progress.step}: {self.stopping.reason}")
        return not stop

    # -- one step --------------------------------------------------------------------------------

    def _step(self, batch: Batch) -> None:
        context, progress, step = self.context, self.progress, self.progress.step
        with self.recorder.probe(step):
            context.rates.set(step)
            loss = forward_backward(context, context.place(batch), step)
            if self._trained is None:
                self._trained = [p for p in context.module.parameters() if p.requires_grad]
            clip = self.config.train.gradient_clip
            context.engine.update(context.optimizer, context.scaler, self._trained, clip)
            self.recorder.collect()
            start = time.perf_counter()
            report = context.controller.step()
            if report is not None:
                self.timers.add("update", time.perf_counter() - start)
                self._trained = None
                self.recorder.update(report)
        progress.step = step + 1
        if self.first_graphs is None:
            self.first_graphs = graphs_compiled()
        self.recorder.step(progress.step, loss, self._waited_s, self.timers)

    def _batches(self) -> Iterator[Batch]:
        """This process's batches from the present step to the last one."""
        batches, left = self.context.batches, self.context.total_steps - self.progress.step
        patience = self.config.train.early_stopping
        while left > 0:
            epoch, start = divmod(self.context.total_steps - left, len(batches))
            iterator = iter(batches.epoch(epoch, start))
            for _ in range(min(left, len(batches) - start)):
                if patience is not None and self.progress.waited >= patience:
                    return
                since = time.perf_counter()
                batch = next(iterator)
                self._waited_s = time.perf_counter() - since
                self.timers.add("data_wait", self._waited_s)
                left -= 1
                yield batch

    # -- between steps ---------------------------------------------------------------------------

    def _evaluate_if_due(self) -> None:
        """Keep the best metric, and count evaluations without a better one."""
        if self.progress.step in self._evaluation_steps:
            splits, progress = self.context.splits, self.progress
            value = self.evaluate("validation" if splits.validation is not None else "test")["metric"]
            better = self.config.task.better(value, progress.best_metric)
            progress.waited = 0 if better else progress.waited + 1
            progress.best_metric = value if better else progress.best_metric

    def evaluate(self, split: str) -> dict[str, Any]:
        """Evaluate on "validation" or "test" and write it down; a collective call."""
        task, progress = self.config.task, self.progress
        with self.timers.aside("eval"):
            metrics = evaluate(self.context, getattr(self.context.splits, split))
        row = {
            "split": split,
            "metric_name": f"{split}_{task.metric}",
            "metric": metrics[task.metric],
            **metrics,
        }
        progress.last = {"step": progress.step, **row}
        self.recorder.evaluation(progress.step, self.timers.wall, row)
        return row

    def _save_if_due(self) -> None:
        """Write a checkpoint on the way; without room for it the training goes on, to the next one."""
        every = self.config.checkpoint.every
        if every is None or self.progress.step % every:
            return
        try:
            self.save()
        except FolderLostError:
            raise
        except CheckpointError as error:
            log.warning("step %d: %s The training goes on.", self.progress.step, error)

    def save(self) -> None:
        """Write a checkpoint, unless this step has one.

        Raises
        ------
        CheckpointError
            If it cannot be written.
        """
        if self._saved == self.progress.step:
            return
        self.recorder.flush()
        self.progress.peak_memory_gib = self.recorder.peak_memory_gib(self.progress.peak_memory_gib)
        self.progress.checkpoint_s = self.stopping.checkpoint_s
        before = self.timers.seconds["checkpoint"]
        with self.timers.aside("checkpoint"):
            snapshot.save(self.store, self.context, self.progress, self.timers, self.settings)
        self.stopping.saved(self.timers.seconds["checkpoint"] - before)
        self._saved = self.progress.step


def _spread(count: int, total: int) -> set[int]:
    """``count`` steps, at most all, equally spaced, the last one at the end."""
    count = min(count, total)
    return {max(1, round(total * i / count)) for i in range(1, count + 1)}
