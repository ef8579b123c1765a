"""The training loop, on any number of ranks, with the method or without it; one step is :meth:`Trainer._step`."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_oialr.data import ArrayDataset, Batch, GlobalBatches
from hpc_oialr.distributed.world import AsyncFlagReduce
from hpc_oialr.errors import CheckpointError, FolderLostError
from hpc_oialr.lowrank import dense_parameters, trainable_parameters
from hpc_oialr.lowrank.base import whole_shape
from hpc_oialr.lowrank.layout import whole
from hpc_oialr.record import peak_rss_bytes
from hpc_oialr.torch_compat import graphs_compiled
from hpc_oialr.train import checkpoint
from hpc_oialr.train.async_checkpoint import AsyncCheckpoints
from hpc_oialr.train.checkpoint import Progress
from hpc_oialr.train.checkpoint_store import CheckpointStore
from hpc_oialr.train.cuda_graph import GraphedStep, refusal
from hpc_oialr.train.recorder import Recorder
from hpc_oialr.train.run_context import RunContext
from hpc_oialr.train.timing import Stopping, StopRequest, Timers

log = logging.getLogger(__name__)


class Trainer:
    """Runs training from the current step to the end.

    ``settings`` are those that may not change, see :mod:`hpc_oialr.train.same_run`. If any rank wants to
    stop, all ranks write a checkpoint after the next step and stop.
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
        self.context, self.store, self.recorder, self.settings = context, store, recorder, settings
        self.config = context.config
        self.stopping = Stopping(stop or StopRequest())
        self._stop_flag = AsyncFlagReduce(context.world)
        self.timers = Timers(context.world.device)
        self.progress = Progress()
        self.first_graphs: int | None = None
        self._graph = GraphedStep(
            self._compute,
            context.module,
            context.world.device,
            eager=lambda: bool(context.controller.gathered),
            refusal=refusal(context),
        )
        if not self._graph.refusal:
            context.rates.device = context.world.device
        total, count = context.total_steps, min(self.config.train.evaluations, context.total_steps)
        self._evaluation_steps = {max(1, round(total * i / count)) for i in range(1, count + 1)}
        self._saved: int | None = None
        self._flushed = True  # whether the record was on disk before the checkpoint under way
        self._writer = AsyncCheckpoints(store, context.world) if self.config.checkpoint.asynchronous else None
        self._waited_s = 0.0

    def resume(self) -> None:
        """Continue from the last intact checkpoint; from the start if there is none."""
        if (step := self.store.latest()) is not None:
            self.progress = checkpoint.load(self.store, step, self.context, self.timers, self.settings)
            self._saved = step
            self.stopping.saved(self.progress.checkpoint_s)

    def fit(self) -> bool:
        """Train to the end; False if stopped on request.

        NonFiniteError if a weight that is due for an SVD holds NaN or Inf, CheckpointError if the last checkpoint
        cannot be written; the training continues if an earlier one cannot.
        """
        self.recorder.begin(self.progress.step)
        self.context.module.train()
        self.stopping.restart()
        stop = False
        with self.timers.training():
            for batch in self._batches():
                self._step(batch)
                self._evaluate_if_due()
                # All ranks learn of a lost folder at the same step.
                lost = self._writer is not None and self._writer.lost
                if stop := self._stop_flag.exchange(self.stopping.wanted() or lost):
                    break
                self._save_if_due()
        self._stop_flag.settle()
        self.save()
        if stop:
            self.recorder.progress.note(f"stopped after step {self.progress.step}: {self.stopping.reason}")
        return not stop

    def _step(self, batch: Batch) -> None:
        context, progress, step = self.context, self.progress, self.progress.step
        with self.recorder.probe(step):
            context.rates.set(step)
            self.recorder.own_time.begin(self._waited_s)
            loss = self._graph(batch)
            self.recorder.collect()
            start = time.perf_counter()
            report = context.controller.step()
            if report is not None:
                self.timers.seconds["update"] += time.perf_counter() - start
                if report.reshaped:
                    self._graph.forget()
                    self.recorder.utilisation.forget()
                self.recorder.update(report)
        progress.step = step + 1
        if self.first_graphs is None:
            self.first_graphs = graphs_compiled()
        self.recorder.step(progress.step, loss, self._waited_s, self.timers)

    def _compute(self, batch: Batch) -> Tensor:
        """The part of a step that a CUDA graph can hold: from the batch to changed parameters; returns the loss."""
        context = self.context
        with self.recorder.utilisation.counting():
            loss = forward_backward(context, batch, self.progress.step, computed=self.recorder.own_time.computed)
        clip = self.config.train.gradient_clip
        clipped = [] if clip is None else [p for p in context.module.parameters() if p.requires_grad]
        context.engine.update(context.optimizer, context.scaler, clipped, clip)
        return loss

    def _batches(self) -> Iterator[Batch]:
        """This rank's batches from the current step to the last one."""
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
                self.timers.seconds["data_wait"] += self._waited_s
                left -= 1
                yield batch

    def _evaluate_if_due(self) -> None:
        """Keep the best metric, and count evaluations without a better one."""
        progress = self.progress
        if progress.step in self._evaluation_steps:
            split = "validation" if self.context.splits.validation is not None else "test"
            value = self.evaluate(split)["metric"]
            progress.waited += 1
            if self.config.task.better(value, progress.best_metric):
                progress.best_metric, progress.waited = value, 0
                splits = self.context.splits
                if self.config.train.test_at_best and splits.validation is not None and splits.test is not None:
                    row = self.evaluate("test")
                    numbers = {name: value for name, value in row.items() if isinstance(value, float)}
                    progress.test_at_best = {"step": progress.step, **numbers}

    def evaluate(self, split: str) -> dict[str, Any]:
        """Evaluate on "validation" or "test" and record it; a collective call."""
        name, progress = self.config.task.metric, self.progress
        with self.timers.aside("eval"):
            metrics = evaluate(self.context, getattr(self.context.splits, split))
        row = {"split": split, "metric_name": f"{split}_{name}", "metric": metrics[name], **metrics}
        progress.last = {"step": progress.step, **row}
        self.recorder.evaluation(progress.step, self.timers.wall, row)
        return row

    def _save_if_due(self) -> None:
        """Write a checkpoint every ``checkpoint.every`` steps, or begin to; training continues if the disk is full."""
        every = self.config.checkpoint.every
        due = every is not None and self.progress.step % every == 0
        if self._writer is not None and (due or (self._writer.done and not self._writer.lost)):
            self._finish_writing()
        if not due:
            return
        try:
            self._write()
        except FolderLostError:
            raise
        except CheckpointError as error:
            log.warning("step %d: %s The training goes on.", self.progress.step, error)

    def save(self) -> None:
        """Write a checkpoint into ``RUN/checkpoints``, unless this step has one; CheckpointError if that fails."""
        self._finish_writing()
        if self._saved != self.progress.step:
            self._write()
            self._finish_writing(strict=True)

    def _write(self) -> None:
        """Write a checkpoint, or begin to."""
        self._flushed = self.recorder.flush()
        self.progress.peak_memory_gib = self.recorder.peak_memory_gib(self.progress.peak_memory_gib)
        self.progress.checkpoint_s = self.stopping.checkpoint_s
        before = self.timers.seconds["checkpoint"]
        with self.timers.aside("checkpoint"):
            checkpoint.save(self._writer or self.store, self.context, self.progress, self.timers, self.settings)
        self.stopping.restart()
        if self._writer is None:
            self._note_checkpoint(self.progress.step, self.timers.seconds["checkpoint"] - before)

    def _finish_writing(self, *, strict: bool = False) -> None:
        """Wait for the checkpoint that is being written beside the training, if one is.

        CheckpointError if it cannot be written and that is ``strict``, or the folder is lost; a warning otherwise.
        """
        if self._writer is None or not self._writer.busy:
            return
        try:
            with self.timers.aside("checkpoint"):
                seconds = self._writer.wait()
        except CheckpointError as error:
            if strict or isinstance(error, FolderLostError):
                raise
            log.warning("step %d: %s The training goes on.", self._writer.step, error)
        else:
            self._note_checkpoint(self._writer.step, seconds)

    def _note_checkpoint(self, step: int, seconds: float) -> None:
        """A checkpoint is on disk, after so many seconds."""
        self.stopping.saved(seconds)
        self._saved = step
        if not self._flushed:
            self.recorder.flush(checkpoint=step)

    def close(self) -> None:
        """Let a checkpoint that is being written be finished, also after an error."""
        if self._writer is not None:
            self._writer.close()

    def summary(self) -> dict[str, Any]:
        """``summary.json`` of a finished run; a collective call, the same on all ranks but for times and memory.

        Evaluates on the test set, or on the validation set if there is no test set.
        """
        context, progress = self.context, self.progress
        split = "test" if context.splits.test is not None else "validation"
        current = progress.last.get("split") == split and progress.last["step"] == progress.step
        final = progress.last if current else self.evaluate(split)
        module, seconds = context.module, self.timers.state_dict()
        units = progress.step * context.units_per_step
        return {
            "model": context.identity["class"],
            "metric": final["metric"],
            "metric_name": final["metric_name"],
            "best_metric": progress.best_metric,
            "test_at_best": progress.test_at_best or None,
            "wall_s": seconds["wall"],
            "update_wall_s": seconds["update"],
            "data_wait_s": seconds["data_wait"],
            "eval_wall_s": seconds["eval"],
            "checkpoint_wall_s": seconds["checkpoint"],
            f"{self.config.task.unit}_per_s": units / seconds["wall"] if seconds["wall"] else 0.0,
            "mfu": self.recorder.mfu,
            "steps": progress.step,
            "trainable_params": trainable_parameters(module),
            "dense_trainable_params": dense_parameters(module),
            "total_params": sum(whole_shape(p).numel() for p in module.parameters()),
            "peak_memory_gib": self.recorder.peak_memory_gib(progress.peak_memory_gib),
            "peak_rss_gib": peak_rss_bytes() / 1024**3,
            "r": context.controller.r,
            "cuda_graph": self._graph.status,
            "recompilations": 0 if self.first_graphs is None else graphs_compiled() - self.first_graphs,
            "world_size": context.world.size,
            "seed": self.config.train.seed,
            "weights_sha256": weights_sha256(context.engine.model_tensors(module)),
        }


def forward_backward(
    context: RunContext, batch: Batch, step: int, *, computed: Callable[[], object] = lambda: None
) -> Tensor:
    """Gradients of the mean loss over the global batch; returns this rank's mean loss, on the device.

    ``batch`` is this rank's part; ``step`` is the number of steps done; ``computed`` is called before the last backward
    pass, in which DDP's ranks wait for each other.
    """
    train, losses, passes = context.config.train, [], context.passes
    parts = {key: value.chunk(train.accumulation) for key, value in passes.place(batch, context.splits.train).items()}
    with passes.casts(context.module):
        for i in range(train.accumulation):
            piece = {key: values[i] for key, values in parts.items()}
            rng, last = np.random.default_rng((train.seed, step, i)), i == train.accumulation - 1
            with nullcontext() if last else context.controller.no_sync():
                with passes.autocast():
                    loss = context.config.task.loss(context.controller.model, piece, rng) / train.accumulation
                if last:
                    computed()
                context.engine.backward(loss, context.scaler)
            losses.append(loss.detach())
    return torch.stack(losses).sum()


@torch.no_grad()
def evaluate(context: RunContext, dataset: ArrayDataset) -> dict[str, float]:
    """Loss and metrics over ``dataset``, equal on all ranks; a collective call. Draws no random numbers."""
    context.share_buffers()
    module, peers, passes = context.module, context.engine.data_parallel, context.passes
    train, task = context.config.train, context.config.task
    batches = GlobalBatches(
        dataset,
        train.evaluation_batch * peers.size,
        world_rank=peers.rank,
        world_size=peers.size,
        seed=train.seed,
        training=False,
        num_workers=train.workers,
    )

    def totals(batch: Batch) -> Tensor:
        with passes.autocast():
            return task.totals(module, passes.place(batch, dataset))

    module.eval()
    eager = torch.compiler.set_stance("force_eager") if context.config.compile != "off" else nullcontext()
    with eager, passes.casts(module):
        parts = [totals(batch) for batch in batches.epoch(0)]
        while len(parts) < len(batches):
            # A rank without a share of the last batch: some engines gather parameters in every forward pass, which is
            # a collective call. Its sample does not count.
            parts.append(torch.zeros_like(totals(dataset.gather(torch.arange(1)))))
    module.train()
    shared = peers.all_gather_object(torch.stack(parts).sum(0).tolist())
    return task.metrics(torch.tensor(shared, dtype=torch.float64).sum(0))


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names, shapes, dtypes and bits; a collective call: gathers sharded tensors one by one."""
    digest = hashlib.sha256()
    for name, stored in sorted(tensors.items()):
        tensor = whole(stored)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
