"""Optimizer state through a change of basis: exact where it can be."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from hpc_oialr import MuonAdamW
from hpc_oialr.errors import ModelError
from hpc_oialr.optim.groups import replace_parameter
from hpc_oialr.optim.stack import OptimizerStack
from hpc_oialr.optim.state import transform_average, transform_state


def orthonormal(m: int, r: int) -> Tensor:
    return torch.linalg.qr(torch.randn(m, r, dtype=torch.float64)).Q


def test_first_moment_is_the_moment_of_the_projected_gradients() -> None:
    """Averaging gradients of S = U^T G Vh^T equals transforming the average of G."""
    U, Vh = orthonormal(8, 4), orthonormal(6, 4).mT
    weight = nn.Parameter(torch.zeros(8, 6, dtype=torch.float64))
    core = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
    optimizers = [torch.optim.Adam([p], lr=0.0) for p in (weight, core)]
    for _ in range(3):
        weight.grad = torch.randn(8, 6, dtype=torch.float64)
        core.grad = U.mT @ weight.grad @ Vh.mT
        for optimizer in optimizers:
            optimizer.step()
    transform_state(optimizers[0], weight, U, Vh)
    torch.testing.assert_close(optimizers[0].state[weight]["exp_avg"], optimizers[1].state[core]["exp_avg"])
    assert optimizers[0].state[weight]["step"] == 3


def test_second_moment_is_right_for_uncorrelated_entries() -> None:
    """E[(U^T G Vh^T)^2] = (U o U)^T E[G^2] (Vh o Vh)^T when the entries of G are independent."""
    U, Vh = orthonormal(6, 3), orthonormal(5, 3).mT
    V = torch.rand(6, 5, dtype=torch.float64) + 0.1
    G = V.sqrt() * torch.randn(200_000, 6, 5, dtype=torch.float64)
    sampled = (U.mT @ G @ Vh.mT).square().mean(0)
    weight = nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], amsgrad=True)
    zeros = torch.zeros_like(V)
    optimizer.state[weight] = {
        "step": torch.tensor(1.0),
        "exp_avg": zeros,
        "exp_avg_sq": V,
        "max_exp_avg_sq": V,
    }
    transform_state(optimizer, weight, U, Vh)
    torch.testing.assert_close(optimizer.state[weight]["exp_avg_sq"], sampled, rtol=0.02, atol=0)
    torch.testing.assert_close(optimizer.state[weight]["max_exp_avg_sq"], sampled, rtol=0.02, atol=0)


def test_rotation_and_cut() -> None:
    P, Qh = orthonormal(6, 4), orthonormal(6, 4).mT
    M = torch.randn(6, 6, dtype=torch.float64)
    core = nn.Parameter(torch.zeros(6, 6, dtype=torch.float64))
    optimizer = torch.optim.SGD([core], momentum=0.9)
    optimizer.state[core] = {"momentum_buffer": M.clone()}
    transform_state(optimizer, core, P, Qh)
    torch.testing.assert_close(optimizer.state[core]["momentum_buffer"], P.mT @ M @ Qh.mT)
    torch.testing.assert_close(transform_average(M, P, Qh), P.mT @ M @ Qh.mT)


def test_unknown_state_is_an_error_that_says_how_to_name_it() -> None:
    core = nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.SGD([core], momentum=0.9)
    optimizer.state[core] = {"momentum_buffer": torch.ones(4, 4), "curvature": torch.ones(4, 4), "count": 7}
    line = re.escape('hpc_oialr.register_optimizer_state(SGD, {"curvature": "gradient"})')
    with pytest.raises(ModelError, match=f"state 'curvature' of a parameter .* unknown meaning.*{line}"):
        transform_state(optimizer, core, torch.eye(4)[:, :2], torch.eye(4)[:2])
    assert torch.equal(optimizer.state[core]["momentum_buffer"], torch.ones(4, 4))


def test_reset_zeroes_moments_and_keeps_the_step() -> None:
    core = nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.Adam([core])
    core.grad = torch.ones(4, 4)
    optimizer.step()
    transform_state(optimizer, core, torch.eye(4)[:, :2], torch.eye(4)[:2], reset=True)
    assert not optimizer.state[core]["exp_avg"].any()
    assert optimizer.state[core]["exp_avg"].shape == (2, 2)
    assert optimizer.state[core]["step"] == 1


def test_a_first_core_moves_to_the_group_for_cores_with_its_momentum() -> None:
    weight, other = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
    optimizer = MuonAdamW([{"params": [weight, other], "algorithm": "adamw"}, {"params": [], "cores": True}])
    weight.grad = torch.randn(4, 4)
    optimizer.step()
    momentum, core = optimizer.state[weight]["exp_avg"].clone(), nn.Parameter(torch.zeros(2, 2))
    transform_state(optimizer, weight, torch.eye(4)[:, :2], torch.eye(4)[:2])
    replace_parameter(OptimizerStack(optimizer), weight, core)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    assert list(optimizer.state[core]) == ["momentum_buffer"]
    assert torch.equal(optimizer.state[core]["momentum_buffer"], momentum[:2, :2])
    core.grad = torch.ones(2, 2)
    optimizer.step()
    assert core.any()


def test_replacing_keeps_group_order_and_moves_the_state() -> None:
    a, b, c = (nn.Parameter(torch.zeros(2, 2)) for _ in range(3))
    optimizer = torch.optim.Adam([{"params": [a], "lr": 1.0}, {"params": [b, c], "lr": 2.0}])
    b.grad = torch.ones(2, 2)
    optimizer.step()
    expected, new = copy.deepcopy(dict(optimizer.state[b])), nn.Parameter(torch.zeros(2, 2))
    replace_parameter(OptimizerStack(optimizer), b, new)
    assert [p is q for p, q in zip(optimizer.param_groups[1]["params"], (new, c), strict=True)] == [
        True,
        True,
    ]
    assert b not in optimizer.state
    assert torch.equal(optimizer.state[new]["exp_avg"], expected["exp_avg"])
