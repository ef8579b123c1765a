"""Peak memory of a conversion or an update of the method."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from hpc_oialr.engines import SingleEngine
from hpc_oialr.method.basis import BasisChanges
from hpc_oialr.method.factorising import core_rotations, weight_factors
from hpc_oialr.method.oialr import OIALR
from hpc_oialr.optim.stack import OptimizerStack
from hpc_oialr.plan.fake_collectives import fake_collectives
from hpc_oialr.plan.fake_tensors import fake_tensors
from hpc_oialr.plan.fake_world import fake_world
from hpc_oialr.plan.schedule import LayerShape, Phase
from hpc_oialr.plan.trace_step import traced_session, trained_parameters
from hpc_oialr.plan.tracer import Tracer
from hpc_oialr.plan.workload import Workload
from hpc_oialr.record.memory import resident_tensors


def trace_event(workload: Workload, phase: Phase, *, processes: int, held: bool) -> float:
    """Most bytes of one process during the event at the beginning of ``phase``; replicated matrices.

    The SVDs are distributed over ``processes``; as many results as there are processes live at once.

    Parameters
    ----------
    held
        Whether something holds the old parameters until the end, as ``DistributedDataParallel`` does.
    """
    with fake_world(0, processes) as world, fake_tensors(), fake_collectives():
        r = (
            {name: phase.before.get(name, r) for name, r in phase.r.items()}
            if phase.event == "update"
            else {}
        )
        session = traced_session(workload, SingleEngine(world), batch=1, r=r)
        controller, trained = session.controller, trained_parameters(session)
        assert isinstance(controller, OIALR)
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        # Makes the optimizer's state.
        session.engine.update(session.optimizer, session.scaler, trained, None)
        keep_alive = list(session.module.parameters()) if held else []
        del trained, parameter
        tracer = Tracer(resident_tensors(session.module, session.optimizer), counted=True)
        sites = [site for site in controller.sites if site.name in phase.before]
        stack = OptimizerStack(session.optimizer)
        with tracer, torch.no_grad():
            # As OIALR does it, with the planned r.
            changes = BasisChanges(session.module, stack, controller.config, (), session.engine)
            if phase.event == "conversion":
                kept = [phase.r[site.name] for site in sites]
                for factors in weight_factors(sites, kept, session.engine):
                    i = factors.index
                    changes.convert(sites[i], factors.U, factors.s[: kept[i]], factors.Vh)
            else:
                for core in core_rotations(sites, session.engine):
                    site = sites[core.index]
                    r_new = phase.r[site.name]
                    assert site.low_rank is not None
                    P, S, Qh = core.P[:, :r_new], core.s[:r_new], core.Qh[:r_new]
                    changes.rotate(site.low_rank, site.name, P, S, Qh, repair=False)
        del keep_alive
        return float(max(tracer.trace.live))


def sharded_event_bytes(shapes: Mapping[str, LayerShape], phase: Phase, processes: int) -> float:
    """Bytes beside what lives between steps, in fp32, where matrices are sharded over ``processes``; a formula.

    One layer at a time. At the conversion (TSQR) process 0 has a copy of its rows, two k x k factors per level of
    the tree, U and Vh of the last one and its own basis; at an update both factors of a core twice.
    """
    if phase.event == "update":
        return 4.0 * max(6.0 * r * r for r in phase.before.values())
    levels = math.ceil(math.log2(processes))
    return 4.0 * max(
        2.0 * shapes[name].m * shapes[name].n / processes + (2 * levels + 6) * k * k
        for name, k in phase.before.items()
    )
