"""Everything random follows from one seed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def seed_model(seed: int) -> None:
    """Torch's generators before the model is made: the same on every process."""
    torch.manual_seed(seed)


def seed_process(seed: int, step: int, rank: int) -> None:
    """Torch's generators from ``step`` on, for dropout: another stream on every process."""
    state = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> np.uint64(1)))


def generator_state(rank: int, device: torch.device) -> dict[str, Tensor]:
    """This process's generators, by name."""
    states = {f"{rank}.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states[f"{rank}.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: Mapping[str, Tensor], rank: int, device: torch.device) -> bool:
    """Put back what :func:`generator_state` gave; False if this process's are not among them."""
    if f"{rank}.cpu" not in states or (device.type == "cuda" and f"{rank}.cuda" not in states):
        return False
    torch.set_rng_state(states[f"{rank}.cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[f"{rank}.cuda"], device)
    return True
