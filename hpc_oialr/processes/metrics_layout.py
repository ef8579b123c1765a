"""Which slot of one float64 vector holds which number: fields of every layer, and fields of every process.

Processes combine their vectors by the largest value of each slot. A slot that a process does not know is
-inf there. The largest of some numbers is one of them, whatever the order in which they are compared, so
that MPI, gloo and any number of processes give the same bits; sums would not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hpc_oialr.errors import WorldError

Values = Mapping[str, float]
_UNKNOWN = -math.inf


@dataclass(frozen=True)
class Gathered:
    """What all processes together know; NaN where nobody knew a number.

    Attributes
    ----------
    layers
        Each layer's fields.
    processes
        Each process's fields, in order of rank.
    """

    layers: dict[str, dict[str, float]]
    processes: list[dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class MetricsLayout:
    """Names to slots and back; must be equal on all processes.

    The vector has ``L F + P G`` slots: each of L layers' F fields, then each of P processes' G fields;
    8 bytes a slot.

    Attributes
    ----------
    layers, layer_fields, process_fields
        Names, in order.
    processes
        How many.
    """

    layers: tuple[str, ...]
    layer_fields: tuple[str, ...]
    process_fields: tuple[str, ...]
    processes: int

    @property
    def size(self) -> int:
        """Slots of the vector."""
        return len(self.layers) * len(self.layer_fields) + self.processes * len(self.process_fields)

    def pack(self, rank: int, layers: Mapping[str, Values], own: Values) -> Tensor:
        """This process's part, of shape (size,), float64, CPU.

        Parameters
        ----------
        layers
            The fields of the layers that this process worked on; NaN stands for a number that is not
            there. Where several processes worked on one layer, the largest number counts.
        own
            The fields of process ``rank``.
        """
        fields = [_values(layers.get(name), self.layer_fields) for name in self.layers]
        rows = [_values(own if i == rank else None, self.process_fields) for i in range(self.processes)]
        flat = [value for row in fields + rows for value in row]
        # Of 0.0 and -0.0 either may count as the larger one; adding zero leaves 0.0 only.
        return torch.tensor(flat, dtype=torch.float64) + 0.0

    def unpack(self, largest: Tensor) -> Gathered:
        """Names and values of the largest of all processes' vectors.

        Parameters
        ----------
        largest
            Shape (size,), float64.

        Raises
        ------
        WorldError
            If no process knew anything of a layer or of a process.
        """
        assert largest.shape == (self.size,)
        values, cut = largest.tolist(), len(self.layers) * len(self.layer_fields)
        layers = dict(zip(self.layers, _rows(values[:cut], self.layer_fields), strict=True))
        processes = _rows(values[cut:], self.process_fields)
        for name, row in (*layers.items(), *((f"process {i}", row) for i, row in enumerate(processes))):
            _check_known(name, row)
        return Gathered(layers, processes)


def _values(given: Values | None, fields: tuple[str, ...]) -> list[float]:
    if given is None:
        return [_UNKNOWN] * len(fields)
    values = [float(given[field]) for field in fields]
    return [_UNKNOWN if math.isnan(value) else value for value in values]


def _rows(values: list[float], fields: tuple[str, ...]) -> list[dict[str, float]]:
    known = [math.nan if value == _UNKNOWN else value for value in values]
    rows = [known[i : i + len(fields)] for i in range(0, len(known), max(1, len(fields)))]
    return [dict(zip(fields, row, strict=True)) for row in rows]


def _check_known(name: str, row: dict[str, float]) -> None:
    if row and all(math.isnan(value) for value in row.values()):
        raise WorldError(
            f"no process told the metrics of {name!r}; at least one must, the one that computed its SVD. Every "
            "process must report the same layers, in the same order."
        )
