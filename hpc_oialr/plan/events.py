"""What a conversion or an update of the method holds at its highest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from hpc_oialr.engines import SingleEngine
from hpc_oialr.lowrank import Site
from hpc_oialr.method.basis import BasisChanges
from hpc_oialr.method.factorising import core_rotations, weight_factors
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.optim.stack import OptimizerStack
from hpc_oialr.plan.imagined import imagined_session, imagined_world
from hpc_oialr.plan.lonely_linalg import lonely_linalg
from hpc_oialr.plan.recorder import Recorder
from hpc_oialr.plan.sequence import Phase, Shape
from hpc_oialr.plan.subject import Subject
from hpc_oialr.plan.valueless import valueless_tensors
from hpc_oialr.record.memory import resident_tensors
from hpc_oialr.train.session import Session


def rehearse_event(subject: Subject, phase: Phase, *, processes: int, held: bool) -> float:
    """Most bytes of one process while the event at the beginning of ``phase`` goes on; whole matrices.

    The SVDs are dealt to ``processes``; as many results as there are processes live at once.

    Parameters
    ----------
    held
        Whether something holds the parameters until all is done, as ``DistributedDataParallel`` does.
    """
    with imagined_world(0, processes) as world, valueless_tensors(), lonely_linalg():
        session = imagined_session(subject, SingleEngine(world), 1)
        controller = session.controller
        assert isinstance(controller, OIALR)
        if phase.event == "update":
            before = {name: phase.before.get(name, r) for name, r in phase.r.items()}
            controller.load_state_dict({"t": 1, "updates": 0, "r": before, "streaks": {}})
        _make_state(session)
        keepsakes = list(session.module.parameters()) if held else []
        recorder = Recorder(resident_tensors(session.module, session.optimizer), counted=True)
        sites = [site for site in controller.sites if site.name in phase.before]
        with recorder, torch.no_grad():
            _change(session, controller, sites, phase)
        del keepsakes
        return float(max(recorder.record.live))


def _make_state(session: Session) -> None:
    trained = [p for p in session.module.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    session.engine.update(session.optimizer, session.scaler, trained, None)


def _change(session: Session, controller: OIALR, sites: Sequence[Site], phase: Phase) -> None:
    """As :class:`OIALR` does it, with the planned r."""
    changes = BasisChanges(
        session.module, OptimizerStack(session.optimizer), controller.config, (), session.engine
    )
    if phase.event == "conversion":
        kept = [phase.r[site.name] for site in sites]
        for factors in weight_factors(sites, kept, session.engine):
            changes.convert(sites[factors.index], factors.U, factors.s[: kept[factors.index]], factors.Vh)
        return
    for rotation in core_rotations(sites, session.engine):
        site = sites[rotation.index]
        r = phase.r[site.name]
        P, s, Qh = rotation.P[:, :r], rotation.s[:r], rotation.Qh[:r]
        assert site.low_rank is not None
        changes.rotate(site.low_rank, site.name, P, s, Qh, repair=False)


def of_split_event(shapes: Mapping[str, Shape], phase: Phase, processes: int) -> float:
    """Bytes beside what lives between steps, in fp32, where matrices are split over ``processes``; a formula.

    One layer at a time. At the conversion (TSQR) process 0 has a copy of its rows, two k x k factors a level of
    the tree, U and Vh of the last one and its own basis; at an update both factors of a core twice.
    """
    if phase.event == "update":
        numbers = max(6.0 * r * r for r in phase.before.values())
    else:
        levels = math.ceil(math.log2(processes))
        numbers = max(
            2.0 * shapes[name].m * shapes[name].n / processes + (2 * levels + 6) * k * k
            for name, k in phase.before.items()
        )
    return 4.0 * numbers
