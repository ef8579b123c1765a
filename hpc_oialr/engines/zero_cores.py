"""Steps of cores, stretched where ZeRO's optimizer takes them: on flat pieces."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpc_oialr.engines.zero_partitions import MASTER, Partitions


class CoreSteps:
    """What :class:`hpc_oialr.optim.core_lr.CoreLearningRate` does, for this process's part of each core.

    Parameters
    ----------
    partitions
        Of the live ZeRO optimizer, to which the hooks are given.
    factors
        By what a parameter's step is multiplied; 1 for the others.
    """

    def __init__(self, partitions: Partitions, factors: Mapping[nn.Parameter, float]) -> None:
        self._parts: defaultdict[int, list[tuple[Tensor, float]]] = defaultdict(list)
        for parameter, place in partitions.places.items():
            factor = factors.get(parameter, 1.0)
            if factor != 1.0 and place.numel:
                values = partitions.part(parameter).values[MASTER]
                self._parts[id(place.flat)].append((values, factor))
        self._before: list[tuple[Tensor, Tensor, float]] = []
        if self._parts:
            partitions.inner.register_step_pre_hook(self._remember)
            partitions.inner.register_step_post_hook(self._stretch)

    @torch.no_grad()
    def _remember(self, inner: torch.optim.Optimizer, *_: Any) -> None:
        stepped = [flat for group in inner.param_groups for flat in group["params"]]
        parts = [part for flat in stepped for part in self._parts.get(id(flat), ())]
        self._before = [(values, values.clone(), factor) for values, factor in parts]

    @torch.no_grad()
    def _stretch(self, *_: Any) -> None:
        for values, before, factor in self._before:
            values.add_((values - before).mul_(factor - 1.0))
        self._before = []
