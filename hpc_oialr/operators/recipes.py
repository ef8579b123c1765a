"""Operators by name, each with settings that solve it on one CPU thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hpc_oialr.operators.kernels import MatrixProblem
from hpc_oialr.operators.schroedinger import Schroedinger, harmonic_oscillator, hydrogen
from hpc_oialr.operators.training import Settings


class Recipe(NamedTuple):
    """An operator, and how its functions are found."""

    problem: Callable[[], MatrixProblem | Schroedinger]
    settings: Settings


def random_matrix(m: int = 400, n: int = 300, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


RECIPES = {
    "harmonic_oscillator": Recipe(harmonic_oscillator, Settings(functions=15, batch=512, steps=2000, lr=3e-3)),
    "hydrogen": Recipe(hydrogen, Settings(functions=9, batch=512, steps=5000, lr=3e-3, balance=True)),
    "matrix": Recipe(lambda: MatrixProblem(random_matrix()), Settings(functions=10, batch=400, steps=6000, lr=0.1)),
}
