"""Steps of cores, stretched where ZeRO's optimizer takes them: on flat pieces."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr.engines.zero_partitions import MASTER, Partitions


def stretch_core_steps(partitions: Partitions, factors: Mapping[nn.Parameter, float]) -> None:
    """Do for this process's part of each core what :class:`hpc_oialr.optim.core_lr.CoreLearningRate` does.

    Parameters
    ----------
    partitions
        Of the live ZeRO optimizer, to which the hooks are given.
    factors
        By what a parameter's step, weight decay included, is multiplied; 1 for the others.
    """
    parts: defaultdict[int, list[tuple[Tensor, float]]] = defaultdict(list)
    for parameter, place in partitions.places.items():
        factor = factors.get(parameter, 1.0)
        if factor != 1.0 and place.numel:
            parts[id(place.flat)].append((partitions.part(parameter).values[MASTER], factor))
    if parts:
        steps = _Steps(parts)
        partitions.inner.register_step_pre_hook(steps.remember)
        partitions.inner.register_step_post_hook(steps.stretch)


class _Steps:
    """Values before a step of some of the flat pieces; ZeRO steps one after another."""

    def __init__(self, parts: Mapping[int, list[tuple[Tensor, float]]]) -> None:
        self._parts = parts
        self._before: list[tuple[Tensor, Tensor, float]] = []

    @torch.no_grad()
    def remember(self, inner: Optimizer, *_: Any) -> None:
        stepped = [flat for group in inner.param_groups for flat in group["params"]]
        parts = [part for flat in stepped for part in self._parts.get(id(flat), ())]
        self._before = [(values, values.clone(), factor) for values, factor in parts]

    @torch.no_grad()
    def stretch(self, *_: Any) -> None:
        for values, before, factor in self._before:
            values.add_((values - before).mul_(factor - 1.0))
        self._before = []
