"""One run of one side: trained, judged on the way, and timed."""

from __future__ import annotations

import math
import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.clock import Clock
from benchmarks.rivals.problems import Data
from benchmarks.rivals.sides import Life, OialrLife, Side, stored_numbers, tensors_of, truncated
from benchmarks.row_file import Row
from hpc_oialr import dense_parameters, trainable_parameters
from hpc_oialr.data import Batch
from hpc_oialr.errors import NonFiniteError
from hpc_oialr.record.memory import MemoryMeter
from hpc_oialr.train.cuda_graph import WARM_UP, GraphedStep
from hpc_oialr.train.schedules import LearningRates, WarmupCosine

# Steps of a phase whose memory is probed on a CPU: the optimizer has state from the second on.
PROBED = 1
WARMUP_SHARE = 0.05


class OutOfTimeError(RuntimeError):
    """The time given to all runs is over."""


@dataclass(frozen=True)
class Length:
    """How long a run is, and what is looked at.

    Attributes
    ----------
    steps
        Of this run.
    evaluations
        Points of the curve, evenly spaced; 0: nothing is judged.
    timed
        Measure each step on its own, waiting for the GPU after each, and the memory; on a CPU in processor seconds.
    like
        Steps of the run that this one stands for, where it is a short one for its times.
    deadline
        Of ``time.time()``.
    """

    steps: int
    evaluations: int = 8
    timed: bool = False
    like: int | None = None
    deadline: float = math.inf


def train(side: Side, data: Data, rate: float, seed: int, length: Length) -> Row:
    """Train one side.

    Returns
    -------
    The metric at the end and on the way; ``train_s`` and ``cpu_s``, wall and processor seconds of training without
    evaluations; ``trained_share`` and ``stored_share`` of the dense model's numbers at the end; ``peak_memory_mib``
    beyond the data's, if ``timed`` or on a GPU; ``before_cut`` and ``after_cut``, where the model is cut; ``truncated``,
    of dense sides the metric after a cut at the end; and if ``timed``, ``phases`` and ``events_s``.
    """
    run = Run(side, data, rate, seed, length)
    marks = {round((i + 1) * length.steps / length.evaluations) for i in range(length.evaluations)}
    with run.clock.running():
        for batch in data.batches(seed):
            run.step(batch)
            if run.done in marks:
                run.note()
            if run.done == length.steps:
                break
    return run.row()


class Run:
    """A side's life, clocks and counters."""

    def __init__(self, side: Side, data: Data, rate: float, seed: int, length: Length) -> None:
        self.side, self.data, self.length, self.device = side, data, length, data.device
        torch.manual_seed(seed)
        cuda = self.device.type == "cuda"
        self.before = torch.cuda.memory_allocated(self.device) if cuda else 0
        model = data.model(seed)
        self.dense, self.stored = dense_parameters(model), stored_numbers(model)
        self.life: Life = side.start(model, data, length.steps, rate)
        self.memory = MemoryMeter(lambda: tensors_of(self.life), self.device)
        refusal = "" if cuda else "it needs a GPU"
        refusal = refusal or self.life.refusal
        if isinstance(self.life, OialrLife):
            refusal = refusal or self.life.refuse_graph(length.like or length.steps)
        self.graph = GraphedStep(self._compute, model, self.device, eager=lambda: self.life.eager, refusal=refusal)
        self.clock, self.done, self.loss = Clock(self.device), 0, torch.zeros((), device=self.device)
        # On a CPU other work disturbs processor seconds least.
        self.now = time.perf_counter if cuda else time.process_time
        self.rates = self._rates()
        self.curve: list[Row] = []
        self.at_cut: Row = {}
        self.times: list[list[float]] = [[]]  # of steps, by phase
        self.hooked: list[float] = []  # of steps with hooks, of all phases
        self.first: list[float] = []  # what a change at the end of a phase took

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        return self.life.model

    def _rates(self) -> LearningRates:
        steps, schedule = self.length.steps, WarmupCosine(warmup=WARMUP_SHARE)
        rates = LearningRates(self.life.optimizer, lambda step: schedule.factor(step, steps))
        third_party = self.side.package is not None
        rates.device = self.device if self.device.type == "cuda" and not third_party else None
        return rates

    def step(self, batch: Batch) -> None:
        """One step and what the side does after it."""
        if self.done % 20 == 0 and time.time() > self.length.deadline:
            raise OutOfTimeError
        timed, hooked, begin = self.length.timed, self.life.eager, self.now()
        self.rates.set(self.done)
        probed = timed and not hooked and self.device.type == "cpu" and len(self.times[-1]) == PROBED
        with self.memory.probe() if probed else nullcontext():
            self.loss = self.graph(batch)
        self.done += 1
        if timed:
            self.clock.finish()
            seconds = math.nan if probed else self.now() - begin
            (self.hooked if hooked else self.times[-1]).append(seconds)
        cuts, judging = self.done == self.life.cut, self.length.evaluations > 0
        if cuts and judging:
            with self.clock.paused():
                self.at_cut["before_cut"] = self.data.judge(self.model)
        begin = self.now()
        if self.life.after(self.done):
            self._changed(begin)
        if cuts and judging:
            with self.clock.paused():
                self.at_cut["after_cut"] = self.data.judge(self.model)

    def _changed(self, begin: float) -> None:
        self.graph.forget()
        if self.life.optimizer is not self.rates.optimizer:
            self.rates = self._rates()
        if self.length.timed:
            self.clock.finish()
            self.first.append(self.now() - begin)
            self.times.append([])

    def _compute(self, batch: Batch) -> Tensor:
        """Forward, backward, optimizer: what a CUDA graph holds; returns the loss."""
        loss = self.data.loss(self.model, batch)
        loss.backward()
        clip = self.life.clip or self.data.problem.clip
        if clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.life.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss.detach()

    def note(self) -> None:
        """One point of the curve."""
        with self.clock.paused():
            loss = float(self.loss)
            if not math.isfinite(loss):
                raise NonFiniteError(f"the loss is {loss} after {self.done} steps")
            point = {"step": self.done, "train_s": round(self.clock.wall, 3), "cpu_s": round(self.clock.cpu, 3)}
            self.curve.append({**point, "loss": round(loss, 4), "metric": round(self.data.judge(self.model), 5)})

    def row(self) -> Row:
        """What was found."""
        cuda = self.device.type == "cuda"
        peak = self.memory.peak_bytes - self.before
        row: Row = {
            "steps": self.length.steps,
            "metric": self.curve[-1]["metric"] if self.curve else None,
            "train_s": self.clock.wall,
            "cpu_s": self.clock.cpu,
            "trained_share": trainable_parameters(self.model) / self.dense,
            "stored_share": stored_numbers(self.model) / self.stored,
            "peak_memory_mib": peak / 2**20 if cuda or self.length.timed else None,
            "graph": self.graph.status,
            **self.at_cut,
            "curve": self.curve,
        }
        if self.length.timed:
            row |= self._phases()
        elif self.side.name.startswith("dense") and self.curve:
            row["truncated"] = self.data.judge(truncated(self.model, self.data))
        return row

    def _phases(self) -> Row:
        """Steady steps of each phase, and what all else took: changes, captures, warm-ups, other steps' excess.

        Steps with hooks are counted as in the run that this one stands for, which has more of them.
        """
        phases, events, taken = [], sum(self.first), self.length.steps - len(self.hooked)
        for times in self.times:
            known = [t for t in times if not math.isnan(t)]
            # The first steps make state, and a graph is captured. A single one, before a conversion at once, is no phase.
            steady = known[min(len(known) - 1, WARM_UP + 1) :] if len(known) > 1 else []
            if not steady and self.graph.refusal:
                # Without captures it took what any step of its phase does.
                steady = known
            median = statistics.median(steady) if steady else 0.0
            if times:
                phases.append({"steps": len(times), "share": len(times) / taken, "step_ms": 1000 * median})
            events += sum(known) - len(known) * median
        if self.hooked:
            count = self.life.hooked_steps(self.length.like or self.length.steps)
            events += count * (statistics.fmean(self.hooked) - phases[0]["step_ms"] / 1000)
        return {"phases": phases, "events_s": events, "like_steps": self.length.like}
