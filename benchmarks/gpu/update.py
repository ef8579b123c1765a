"""The method's own work: conversion and updates of whole models, in seconds and in waits of the host.

Optimizer: AdamW with moments, carried along. Between two updates the cores get noise, since the SVD of a core that
is still diagonal would be an easy one. On a GPU each model is measured with the SVDs of today's package, by the Gram
matrix, and by the driver that it falls back to, gesvdj.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NoReturn
from unittest import mock

import torch
from torch import Tensor

from benchmarks.common import Row
from benchmarks.gpu import counts
from benchmarks.gpu.execution import make_optimizer
from benchmarks.gpu.models import Workload, on_device, workloads
from benchmarks.gpu.runner import Case, Context
from benchmarks.gpu.timing import synchronise
from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits, UpdateReport, low_rank_layers
from hpc_oialr.linalg.gram_svd import gram_svd
from hpc_oialr.linalg.svd import svds

FRACTIONS = (0.5, 0.25, 0.125)


def cases(context: Context) -> Sequence[Case]:
    """Two cases a model, one for each kind of SVD: its conversion and the updates that follow."""
    models = workloads(tiny=context.tiny)
    names = ("ViT-B/16", "Llama-like 350M")
    return [Case(f"{name}, {way}", partial(measure, models[name], way, context)) for name in names for way in WAYS]


def not_converged(A: Tensor, form: str) -> NoReturn:
    """In place of ``gram_svd``: the package goes on to gesvdj."""
    raise torch.linalg.LinAlgError("not tried")  # type: ignore[attr-defined]


WAYS = {"Gram matrix": gram_svd, "gesvdj": not_converged}


def measure(workload: Workload, way: str, context: Context) -> Iterator[Row]:
    """Conversion at k/2; at k/2, k/4 and k/8 an update that keeps r, before each smaller one the cut to it."""
    with mock.patch("hpc_oialr.linalg.svd.gram_svd", WAYS[way]):
        svds([torch.eye(64, device=context.device)] * 2, "ab")  # libraries and kernels are loaded
        for row in _events(workload, context):
            yield row | {"svd": way}


def _events(workload: Workload, context: Context) -> Iterator[Row]:
    device = context.device
    model = on_device(workload, device)
    optimizer = make_optimizer("AdamW", model, workload.selection)
    config = OIALRConfig(
        delay=1,
        frequency=1,
        rule=FixedFraction(FRACTIONS[0]),
        limits=RankLimits(max_drop=1.0, at_conversion=FRACTIONS[0]),
        selection=workload.selection,
        layer_share_step=1.0,
        importance="weights",
    )
    oialr = OIALR(model, optimizer, config)
    counts.start_peak(device)
    optimizer_step(oialr)
    dense_gib = counts.peak_gib(device)
    yield _event("conversion", FRACTIONS[0], oialr, workload, device) | {"dense_gib": dense_gib}
    for before, fraction in zip((FRACTIONS[0], *FRACTIONS), FRACTIONS, strict=False):
        oialr.config.rule = FixedFraction(fraction)
        for kind in ("update",) if fraction == before else ("cut", "update"):
            optimizer_step(oialr)
            disturb(oialr)
            yield _event(kind, fraction, oialr, workload, device)


def optimizer_step(oialr: OIALR) -> None:
    """One step with random gradients: moments to carry along."""
    for p in oialr.module.parameters():
        if p.requires_grad:
            p.grad = 1e-3 * torch.randn_like(p)
    oialr.optimizer.step()


@torch.no_grad()
def disturb(oialr: OIALR) -> None:
    """Noise of about the size of the cores' mean singular value: far from diagonal, as after many steps."""
    for layer in low_rank_layers(oialr.module).values():
        size = layer.S.diagonal().mean() / layer.r**0.5
        layer.S.add_(size * torch.randn_like(layer.S))


def _event(kind: str, fraction: float, oialr: OIALR, workload: Workload, device: torch.device) -> Row:
    counts.start_peak(device)
    synchronise(device)
    begin = time.perf_counter()
    with counts.synchronisations(device) as waits:
        report = oialr.step()
    synchronise(device)
    seconds = time.perf_counter() - begin
    assert isinstance(report, UpdateReport)
    return {
        "model": workload.name,
        "event": kind,
        "r_over_k": fraction,
        "layers": len(report.layers),
        "seconds": seconds,
        "synchronisations": waits.count,
        "synchronisations_per_layer": waits.count / len(report.layers),
        "places": waits.places,
        "peak_gib": counts.peak_gib(device),
        "orthogonality_error": max(max(u.orthogonality_error_U, u.orthogonality_error_Vh) for u in report.layers),
    }
