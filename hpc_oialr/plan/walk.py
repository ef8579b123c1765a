"""A session that goes through the phases of a plan in a few steps: the same code, other delays."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import cast

import torch

from hpc_oialr.data import Batch, DataConfig
from hpc_oialr.engines import Engine, EngineConfig
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.method.report import UpdateReport
from hpc_oialr.method.rules import RankRule
from hpc_oialr.plan.imagined import Ready
from hpc_oialr.plan.subject import Blank, Subject
from hpc_oialr.train.one_step import forward_backward
from hpc_oialr.train.session import Session, make_session

_NEVER = 10**8
_MOST_UPDATES = 200


class Walk:
    """Steps when asked, and the method's events when asked.

    Parameters
    ----------
    session
        Of :func:`walking_session`.

    Attributes
    ----------
    event_s
        Wall time of the last event (s).
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.steps = 0
        self.event_s = 0.0
        session.module.train()

    def samples(self, batch: int) -> Batch:
        """So many samples of the training data, for this process."""
        return self.session.splits.train.gather(torch.arange(batch))

    def step(self, batch: int) -> float:
        """One step with ``batch`` samples; its wall time with their gathering, without the method's part (s)."""
        start = time.perf_counter()
        self.learn(self.samples(batch))
        seconds = time.perf_counter() - start
        self.session.controller.step()
        return seconds

    def learn(self, samples: Batch) -> None:
        """Forward and backward pass, and the optimizer's step."""
        session = self.session
        forward_backward(session, session.place(samples), self.steps)
        trained = [p for p in session.module.parameters() if p.requires_grad]
        session.engine.update(session.optimizer, session.scaler, trained, session.config.train.gradient_clip)
        self.steps += 1

    def convert(self, samples: Batch) -> UpdateReport:
        """A step with the conversion after it."""
        controller = self._method()
        controller.config.delay = controller.t + 1
        return self._event(samples)

    def update(self, samples: Batch) -> UpdateReport:
        """A step with an update after it."""
        config = self._method().config
        config.frequency = 1
        report = self._event(samples)
        config.frequency = _NEVER
        return report

    def settle(self, samples: Batch) -> None:
        """Updates until r stays."""
        controller = self._method()
        for _ in range(_MOST_UPDATES):
            before = controller.r
            self.update(samples)
            if controller.r == before and controller.updates * controller.config.layer_share_step >= 1:
                return

    def _event(self, samples: Batch) -> UpdateReport:
        self.learn(samples)
        start = time.perf_counter()
        report = self.session.controller.step()
        self.event_s = time.perf_counter() - start
        assert report is not None
        return report

    def _method(self) -> OIALR:
        controller = self.session.controller
        assert isinstance(controller, OIALR)
        return controller


def walking_session(
    subject: Subject,
    engine: Engine,
    *,
    batch: int,
    rule: RankRule | None = None,
    blank: bool = False,
) -> Session:
    """The session of a subject whose events wait until they are asked for.

    Parameters
    ----------
    engine
        Of the processes that are there.
    batch
        Samples of one process and step.
    rule
        In place of the recipe's.
    blank
        Made-up data in place of the recipe's.
    """
    config, method = subject.config, subject.config.oialr
    if method is not None:
        method = replace(
            method,
            delay=_NEVER,
            frequency=_NEVER,
            rule=rule or method.rule,
            stability_frequency=None,
            stability_threshold=None,
        )
    global_batch = batch * engine.data.size
    train = replace(config.train, global_batch=global_batch, steps=10**9, workers=0, device=None)
    data = cast(DataConfig, Blank(subject, global_batch)) if blank else config.data
    ready = cast(EngineConfig, Ready(engine))
    config = replace(config, oialr=method, train=train, data=data, engine=ready, compile=False)
    return make_session(config, engine.world)
