"""The run's own code on tensors without data: what a step would hold, compute and send."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hpc_oialr.engines import DDP, DeepSpeed, EngineConfig, FSDPEngine, TensorEngine
from hpc_oialr.engines.base import Engine
from hpc_oialr.lowrank.layout import local
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.plan.imagined import imagined_session, imagined_world
from hpc_oialr.plan.recorder import Record, Recorder
from hpc_oialr.plan.subject import Subject
from hpc_oialr.plan.valueless import valueless_tensors
from hpc_oialr.record.memory import resident_tensors
from hpc_oialr.train.one_step import forward_backward
from hpc_oialr.train.session import Session


@dataclass(frozen=True)
class Tensors:
    """Bytes that live between steps on one process.

    Attributes
    ----------
    trained
        Parameters that have gradients.
    frozen
        Parameters that have none: the bases.
    buffers
        Of the model.
    state
        The optimizer's.
    """

    trained: float
    frozen: float
    buffers: float
    state: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.trained + self.frozen + self.buffers + self.state


@dataclass(frozen=True)
class Step:
    """One step of one process.

    Attributes
    ----------
    tensors
        What lives between steps.
    forward_backward
        Forward and backward pass.
    update
        The optimizer's step.
    """

    tensors: Tensors
    forward_backward: Record
    update: Record


def rehearse(
    subject: Subject, engine: EngineConfig, *, processes: int, batch: int, r: Mapping[str, int]
) -> Step:
    """One step of process 0, which has the most of everything.

    Under ``DDP`` and ``DeepSpeed``, which work on real tensors only, it is the step of the bare module.

    Parameters
    ----------
    engine
        How processes share the work.
    batch
        Samples of one process and step.
    r
        Inner dimension of every low-rank layer; empty: all is dense.
    """
    bare = isinstance(engine, (DDP, DeepSpeed))
    with imagined_world(0, 1 if bare else processes) as world:
        made = engine.build(world, subject.config.train.precision)
        with valueless_tensors():
            return _step(_session(subject, made, batch, r), subject, batch)


def _session(subject: Subject, engine: Engine, batch: int, r: Mapping[str, int]) -> Session:
    session = imagined_session(subject, engine, batch)
    if r:
        assert isinstance(session.controller, OIALR)
        session.controller.load_state_dict({"t": 1, "updates": 0, "r": dict(r), "streaks": {}})
    session.module.train()
    return session


def _step(session: Session, subject: Subject, batch: int) -> Step:
    forward = _recorder(session)
    with _noting_gradients(session, forward), forward:
        # The batch counts: on a GPU it is brought there in each step.
        samples = subject.batch(batch)
        forward_backward(session, samples, 0)
    # The optimizer makes its state in its first step; the second one is like all others.
    _optimize(session)
    update = _recorder(session)
    for parameter in _trained(session):
        parameter.grad = torch.empty_like(parameter)
        update.note_gradient(parameter)
    with update:
        _optimize(session)
    return Step(tensors_of(session), forward.record, update.record)


def _recorder(session: Session) -> Recorder:
    known = resident_tensors(session.module, session.optimizer)
    return Recorder(known, resizing=isinstance(session.engine, FSDPEngine))


@contextmanager
def _noting_gradients(session: Session, recorder: Recorder) -> Iterator[None]:
    """FSDP2 gives gradients to its parameters itself, later; there all is counted together."""
    if isinstance(session.engine, FSDPEngine):
        yield
        return
    handles = [p.register_post_accumulate_grad_hook(recorder.note_gradient) for p in _trained(session)]
    yield
    for handle in handles:
        handle.remove()


def _optimize(session: Session) -> None:
    clip = session.config.train.gradient_clip
    if isinstance(session.engine, TensorEngine):
        # Selects by values; what it holds is a number a parameter.
        clip = None
    session.engine.update(session.optimizer, session.scaler, _trained(session), clip)


def _trained(session: Session) -> list[torch.nn.Parameter]:
    return [p for p in session.module.parameters() if p.requires_grad]


def tensors_of(session: Session) -> Tensors:
    """What a session holds between steps."""
    parameters = list(session.module.parameters())
    state = list(resident_tensors(session.optimizer))
    return Tensors(
        trained=sum(local(p).nbytes for p in parameters if p.requires_grad),
        frozen=sum(local(p).nbytes for p in parameters if not p.requires_grad),
        buffers=sum(b.nbytes for b in session.module.buffers()),
        state=sum(local(t).nbytes for t in state),
    )
