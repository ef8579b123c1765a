"""Times of an update on all ranks, and its line in ``updates.jsonl``.

Every rank has the same singular values; only times differ. Each rank packs those it measured into a float64 vector, with
-inf elsewhere, and vectors are reduced by the maximum of each slot, which gives the same bits in any order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpc_oialr.method.report import UpdateReport
from hpc_oialr.record.quantities import effective_rank, stable_rank

_UNKNOWN = -math.inf


@dataclass(frozen=True)
class SharedUpdate:
    """An update with the times of all ranks."""

    report: UpdateReport  # its layers' seconds are those of the rank that computed the SVD, of the slowest of several
    update_s: tuple[float, ...]  # wall time of the whole update on each rank

    @property
    def svd_s(self) -> float:
        """Sum of all layers' SVDs; above the wall time where ranks share the work."""
        return sum(layer.seconds for layer in self.report.layers)

    def row(self) -> dict[str, Any]:
        """One line of ``updates.jsonl``: times, and means over the layers; NaN where no layer has a number."""
        layers = self.report.layers
        spectra = [layer.singular_values.double().numpy() for layer in layers]
        return {
            "step": self.report.t,
            "kind": self.report.kind,
            "layers": len(layers),
            "update_s": list(self.update_s),
            "svd_s": self.svd_s,
            "bytes_sent": self.report.bytes_sent,
            "r_mean": _mean(layer.r for layer in layers),
            "stability_mean": _mean(layer.stability for layer in layers if layer.stability is not None),
            "stable_rank_mean": _mean(map(stable_rank, spectra)),
            "effective_rank_mean": _mean(map(effective_rank, spectra)),
        }


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def pack(report: UpdateReport, rank: int, size: int) -> Tensor:
    """This rank's seconds of each SVD that it computed, and of the update; shape (layers + ranks,)."""
    svds = [layer.seconds if layer.seconds > 0 else _UNKNOWN for layer in report.layers]
    updates = [report.seconds if i == rank else _UNKNOWN for i in range(size)]
    return torch.tensor(svds + updates, dtype=torch.float64)


def unpack(report: UpdateReport, largest: Tensor) -> SharedUpdate:
    """The update with all times, from the reduced vector."""
    values, count = largest.tolist(), len(report.layers)
    assert _UNKNOWN not in values, "every SVD and every update was timed by some rank"
    layers = (replace(layer, seconds=s) for layer, s in zip(report.layers, values[:count], strict=True))
    return SharedUpdate(replace(report, layers=tuple(layers)), tuple(values[count:]))
