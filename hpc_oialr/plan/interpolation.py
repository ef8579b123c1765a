"""Steps on any number of processes from a few that were rehearsed.

Everything in a step is a constant, plus a part for each sample of the process, plus a part that is dealt over the
processes; so with a fixed batch, of a process or of all, it is a straight line in one over the processes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace

import numpy as np

from hpc_oialr.engines import DDP, DeepSpeed, EngineConfig
from hpc_oialr.plan.places import Place
from hpc_oialr.plan.recorder import Message, Record
from hpc_oialr.plan.rehearsal import Step, Tensors, rehearse
from hpc_oialr.plan.subject import Subject


class Rehearsals:
    """Rehearsed steps of a subject, each made once.

    Parameters
    ----------
    subject
        What is rehearsed.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._known: dict[tuple[str, int, int, tuple[int, ...]], Step] = {}

    def steps(self, engine: EngineConfig, places: Sequence[Place], r: Mapping[str, int]) -> dict[Place, Step]:
        """A step in every place; the smallest and the largest are rehearsed, the others lie between them.

        Where another number of operations shows that one does not, because layers go another way with fewer
        tokens or groups have one member only, it is rehearsed too.
        """
        found = {p: self._rehearsed(engine, p, r) for p in places if p.processes == 1}
        many = [p for p in places if p.processes > 1]
        order = sorted(many, key=lambda place: (1.0 / place.processes, place.batch))
        pending = [(order[0], order[-1], order[1:-1])] if order else []
        for end in order[:1] + order[-1:]:
            found[end] = self._rehearsed(engine, end, r)
        while pending:
            low, high, between = pending.pop()
            if not between:
                continue
            if _alike(found[low], found[high]):
                found |= {
                    p: _between(found[low], found[high], _weight(engine, low, p, high), p) for p in between
                }
                continue
            middle = between[len(between) // 2]
            found[middle] = self._rehearsed(engine, middle, r)
            at = between.index(middle)
            pending += [(low, middle, between[:at]), (middle, high, between[at + 1 :])]
        return found

    def _rehearsed(self, engine: EngineConfig, place: Place, r: Mapping[str, int]) -> Step:
        bare = place.processes == 1 or isinstance(engine, (DDP, DeepSpeed))
        name = "bare" if bare else repr(engine)
        key = (name, 1 if bare else place.processes, place.batch, tuple(r.values()))
        if key not in self._known:
            self._known[key] = rehearse(
                self.subject, engine, processes=place.processes, batch=place.batch, r=r
            )
        return self._known[key]


def _weight(engine: EngineConfig, low: Place, place: Place, high: Place) -> float:
    if isinstance(engine, (DDP, DeepSpeed)) and low.batch != high.batch:
        return (place.batch - low.batch) / (high.batch - low.batch)
    ends = [1.0 / p.processes for p in (low, place, high)]
    return (ends[1] - ends[0]) / (ends[2] - ends[0])


def _alike(a: Step, b: Step) -> bool:
    pairs = ((a.forward_backward, b.forward_backward), (a.update, b.update))
    return all(len(x.live) == len(y.live) and _kinds(x) == _kinds(y) for x, y in pairs)


def _kinds(record: Record) -> Sequence[tuple[str, bool]]:
    return [(message.collective, message.stride > 1) for message in record.messages]


def _between(a: Step, b: Step, w: float, place: Place) -> Step:
    tensors = {
        f.name: _mix(getattr(a.tensors, f.name), getattr(b.tensors, f.name), w) for f in fields(Tensors)
    }
    return Step(
        Tensors(**tensors),
        _mixed(a.forward_backward, b.forward_backward, w, place),
        _mixed(a.update, b.update, w, place),
    )


def _mix(a: float, b: float, w: float) -> float:
    return a + w * (b - a)


def _mixed(a: Record, b: Record, w: float, place: Place) -> Record:
    return Record(
        live=_line(a.live, b.live, w),
        gradients=_line(a.gradients, b.gradients, w),
        flops=Counter({key: round(_mix(a.flops[key], b.flops[key], w)) for key in a.flops}),
        moved=_mix(a.moved, b.moved, w),
        messages=[_message(x, y, w, place) for x, y in zip(a.messages, b.messages, strict=True)],
    )


def _line(a: Sequence[float], b: Sequence[float], w: float) -> list[float]:
    mixed: list[float] = _mix(np.asarray(a, dtype=float), np.asarray(b, dtype=float), w).tolist()  # type: ignore[arg-type,attr-defined]
    return mixed


def _message(a: Message, b: Message, w: float, place: Place) -> Message:
    grown = a.processes if a.processes == b.processes else place.processes // a.stride
    return replace(a, size=_mix(a.size, b.size, w), processes=grown)
