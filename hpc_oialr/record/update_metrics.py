"""What processes tell each other about one event of the method, and what it adds up to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hpc_oialr.distributed.metric_reduction import MetricsLayout
from hpc_oialr.method.report import LayerUpdate, UpdateReport

LAYER_FIELDS = ("seconds", "r", "stability", "s_max", "s_sum", "s_square_sum", "s_log_sum")
PROCESS_FIELDS = ("update_s",)


@dataclass(frozen=True)
class SharedUpdate:
    """An event as all processes saw it.

    Attributes
    ----------
    report
        The event; its layers' seconds are those of the process that computed the SVD, of the slowest of several.
    update_s
        Wall time of the whole event on each process, in order of rank (s).
    layers
        For each layer ``LAYER_FIELDS``: seconds of its SVD, r, stability (NaN where there was none),
        and of its singular values s before the cut the largest, sum s, sum s^2 and sum s ln s.
    """

    report: UpdateReport
    update_s: tuple[float, ...]
    layers: dict[str, dict[str, float]]

    @property
    def svd_s(self) -> float:
        """Seconds of all layers' SVDs, added up; above the wall time where processes share the work."""
        return sum(layer["seconds"] for layer in self.layers.values())

    def row(self) -> dict[str, Any]:
        """One line of ``updates.jsonl``: times, and means over the layers; null where no layer has a number."""
        return {
            "step": self.report.t,
            "kind": self.report.kind,
            "layers": len(self.layers),
            "update_s": list(self.update_s),
            "svd_s": self.svd_s,
            "bytes_sent": self.report.bytes_sent,
            "r_mean": self._mean(lambda layer: layer["r"]),
            "stability_mean": self._mean(lambda layer: layer["stability"]),
            "stable_rank_mean": self._mean(stable_rank),
            "effective_rank_mean": self._mean(effective_rank),
        }

    def _mean(self, figure: Callable[[dict[str, float]], float]) -> float:
        every = [figure(layer) for layer in self.layers.values()]
        values = [value for value in every if not math.isnan(value)]
        return sum(values) / len(values) if values else math.nan


def layout_of(report: UpdateReport, processes: int) -> MetricsLayout:
    """The slots of an event."""
    names = tuple(layer.name for layer in report.layers)
    return MetricsLayout(
        layers=names, layer_fields=LAYER_FIELDS, process_fields=PROCESS_FIELDS, processes=processes
    )


def pack(report: UpdateReport, rank: int, processes: int) -> Tensor:
    """What process ``rank`` knows: the layers whose SVD it computed, and its own time.

    Float64, one slot a number: ``8 (7 L + P)`` bytes for L layers and P processes.
    """
    mine = {layer.name: layer_values(layer) for layer in report.layers if layer.seconds > 0}
    return layout_of(report, processes).pack(rank, mine, {"update_s": report.seconds})


def unpack(report: UpdateReport, processes: int, largest: Tensor) -> SharedUpdate:
    """The event with what all know.

    Raises
    ------
    WorldError
        If no process told of a layer.
    """
    gathered = layout_of(report, processes).unpack(largest)
    layers = tuple(replace(layer, seconds=gathered.layers[layer.name]["seconds"]) for layer in report.layers)
    times = tuple(row["update_s"] for row in gathered.processes)
    return SharedUpdate(replace(report, layers=layers), times, gathered.layers)


def layer_values(layer: LayerUpdate) -> dict[str, float]:
    """``LAYER_FIELDS`` of one layer; sums in float64."""
    s = layer.singular_values.double()
    return {
        "seconds": layer.seconds,
        "r": float(layer.r),
        "stability": math.nan if layer.stability is None else layer.stability,
        "s_max": float(s.max()) if s.numel() else 0.0,
        "s_sum": float(s.sum()),
        "s_square_sum": float(s.square().sum()),
        "s_log_sum": float(torch.special.xlogy(s, s).sum()),
    }


def stable_rank(layer: dict[str, float]) -> float:
    """``sum s^2 / s_max^2``; 0 for a matrix of zeros.

    Examples
    --------
    >>> stable_rank({"s_max": 2.0, "s_square_sum": 12.0})
    3.0
    """
    return layer["s_square_sum"] / layer["s_max"] ** 2 if layer["s_max"] else 0.0


def effective_rank(layer: dict[str, float]) -> float:
    """``exp(-sum p ln p)`` with ``p = s / sum s``; 0 for a matrix of zeros.

    References
    ----------
    Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.

    Examples
    --------
    >>> round(effective_rank({"s_sum": 8.0, "s_log_sum": 8.0 * math.log(2.0)}), 12)
    4.0
    """
    total = layer["s_sum"]
    return math.exp(math.log(total) - layer["s_log_sum"] / total) if total else 0.0
