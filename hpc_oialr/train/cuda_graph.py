"""A training step as one CUDA graph: when it is captured, when it runs eagerly instead, and why."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from hpc_oialr.data import Batch
from hpc_oialr.errors import ConfigError
from hpc_oialr.method.engine import SingleEngine
from hpc_oialr.optim import MuonAdamW
from hpc_oialr.torch_compat import free_pool
from hpc_oialr.train.run_context import RunContext

log = logging.getLogger(__name__)

T = TypeVar("T")
# Eager steps of new shapes before they are captured: they make the optimizer's state, measure kernels, compile.
WARM_UP = 3
# A capture takes about a second on the host, which fewer steps between two updates do not make up for.
SHORTEST = 20


class CaptureError(RuntimeError):
    """A step cannot be captured; nothing of it has been computed."""


def capture(call: Callable[[], T], device: torch.device, *, pool: Any = None) -> tuple[Callable[[], None], T]:
    """Record what ``call`` launches, without computing it; returns the replay, and the result that replays fill.

    Memory of the graph is kept as long as the replay function is. CaptureError, with the cause, where ``call`` does
    what a graph cannot hold, such as to wait for the device.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    # A graph tells its own pool only once it is captured.
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    try:
        # Threads that pin memory for batches may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = call()
    except Exception as error:
        # torch 2.11 stays on the capture's stream, its random generator waits for the capture's end for ever, and what
        # the step would have held, most of a GPU's memory, stays in the graph's pool.
        torch.cuda.set_stream(stream)
        torch.cuda.synchronize(device)
        free_pool(pool, device)
        for generator in torch.cuda.default_generators:
            generator.graphsafe_set_state(generator.clone_state())
        # The first error is the cause; the end of the capture then raises one of its own.
        raise CaptureError(cause(error.__context__ or error)) from error
    return graph.replay, result


def cause(error: BaseException) -> str:
    """The first line of an error, and the line of code outside of torch that led to it."""
    lines = str(error).splitlines() or [type(error).__name__]
    # "backend='inductor' raised:" has it in the next line.
    said = " ".join(lines[: 1 + lines[0].endswith(":")])[:160]
    torch_itself = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(torch_itself)]
    return f"{said}; {Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}" if frames else said


class GraphedStep:
    """Runs ``step``, which takes a batch to a loss: eagerly at first, as a replayed graph once shapes have settled.

    A graph is captured after :data:`WARM_UP` steps with the same shapes of the batch and the same trained parameters, and
    dropped when these change, ``eager`` says so or :meth:`forget` is called. If it cannot be captured, ``step`` runs
    eagerly from then on.

    Parameters
    ----------
    step
        Must end without gradients, and use nothing that the host decides anew in each step.
    module
        Whose trained parameters are watched.
    eager
        Whether the step about to be made must run eagerly, for hooks of layers.
    refusal
        Why nothing is ever captured; "" if it may be.
    """

    def __init__(
        self,
        step: Callable[[Batch], Tensor],
        module: nn.Module,
        device: torch.device,
        *,
        eager: Callable[[], bool] = lambda: False,
        refusal: str = "",
    ) -> None:
        self._step, self._module, self._device, self._must_be_eager = step, module, device, eager
        self.refusal, self.captures = refusal, 0
        self.forget()
        if refusal:
            log.info("no CUDA graph of the steps: %s", refusal)

    @property
    def status(self) -> str:
        """ "on", or "off: " and why."""
        if self.refusal or not self.captures:
            return f"off: {self.refusal or 'too few steps with the same shapes'}"
        return "on"

    def forget(self) -> None:
        """Drop the graph: parameters or the optimizer's state are, or may be, in another place."""
        self._captured: tuple[Callable[[], None], Tensor] | None = None  # the replay, and the loss that it fills
        self._inputs: Batch = {}
        self._shapes: Any = None
        self._eager = 0

    def __call__(self, batch: Batch) -> Tensor:
        """One step; returns its loss, on the device."""
        if self.refusal:
            return self._step(batch)
        if self._must_be_eager():
            self.forget()
            return self._step(batch)
        # Ids, since references would keep replaced parameters alive.
        trained = [id(p) for p in self._module.parameters() if p.requires_grad]
        shapes = ({name: (value.shape, value.dtype) for name, value in batch.items()}, trained)
        if shapes != self._shapes:
            self.forget()
            self._shapes = shapes
        if self._captured is None:
            if self._eager < WARM_UP:
                self._eager += 1
                return self._step(batch)
            self._capture(batch)
        if self._captured is None:
            return self._step(batch)
        for name, value in batch.items():
            self._inputs[name].copy_(value, non_blocking=True)
        replay, loss = self._captured
        replay()
        # The next replay overwrites its own.
        return loss.clone()

    def _capture(self, batch: Batch) -> None:
        self._inputs = {name: value.to(self._device, copy=True) for name, value in batch.items()}
        try:
            self._captured = capture(lambda: self._step(self._inputs), self._device)
        except CaptureError as error:
            self.refusal = f"it cannot be captured ({error})"
            log.warning("no CUDA graph of the steps from now on: %s", self.refusal)
            # Gradients of the capture hold no values.
            self._module.zero_grad(set_to_none=True)
            self.forget()
            return
        self.captures += 1


def refusal(context: RunContext) -> str:
    """Why steps of this run are not captured, "" if they are; ConfigError if ``train.cuda_graph`` is "on" anyway."""
    train, task, method = context.config.train, context.config.task, context.config.oialr
    reasons = {
        "it needs a GPU": context.world.device.type != "cuda",
        "it is for one process": type(context.engine) is not SingleEngine,
        "the loss scale of fp16 is read by the host": context.scaler.is_enabled(),
        f"{type(task).__name__} draws random numbers on the host": task.draws,
        f"{type(context.optimizer).__name__} computes on the host": not _is_capturable(context.optimizer),
        "deterministic algorithms are asked for": torch.are_deterministic_algorithms_enabled(),
    }
    reason = next((reason for reason, applies in reasons.items() if applies), "")
    if train.cuda_graph == "off":
        return "train.cuda_graph is off"
    if train.cuda_graph == "on":
        if reason:
            fix = 'Set it to "auto" or "off".'
            raise ConfigError("train.cuda_graph", "on", f"cannot be had here: {reason}", fix=fix)
        return ""
    if not reason and method is not None:
        watched = max(0 if method.importance == "weights" else method.moments_steps_of_updates, method.steps_of_growth)
        if method.frequency - watched < SHORTEST:
            names = "oialr.moments_steps, oialr.grow_steps"
            hooks = f", of which the last {watched} run hooks ({names})" if watched else ""
            reason = f"r changes every {method.frequency} steps (oialr.frequency){hooks}: too often"
    return reason


def _is_capturable(optimizer: Optimizer) -> bool:
    """Whether a step reads nothing from the device, and takes its learning rate from a tensor there."""
    # Exact types: a subclass may do more.
    if type(optimizer) in (SGD, MuonAdamW):
        return all(group["fused"] for group in optimizer.param_groups)
    return all(group.get("capturable") for group in optimizer.param_groups)
