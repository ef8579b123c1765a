"""Every layer kind under autocast against its dense twin in float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hpc_oialr.lowrank import Selection, convert, low_rank_layers, merge

pytestmark = pytest.mark.gpu

ALL = Selection(keep_last=False, max_aspect=100)
# name: (layer, shapes of its inputs; one shape for self-attention is query = key = value)
CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "linear": (lambda: nn.Linear(64, 96), [(8, 16, 64)]),
    "linear without bias": (lambda: nn.Linear(96, 64, bias=False), [(128, 96)]),
    "transformers Conv1D": (lambda: Conv1D(96, 32), [(8, 16, 32)]),
    "conv1d": (lambda: nn.Conv1d(32, 48, 3, padding=1), [(4, 32, 24)]),
    "conv2d": (lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1), [(4, 16, 12, 12)]),
    "conv3d": (lambda: nn.Conv3d(8, 16, 2), [(2, 8, 5, 5, 5)]),
    "self-attention": (lambda: nn.MultiheadAttention(64, 4, batch_first=True), [(4, 12, 64)]),
    "cross-attention": (lambda: nn.MultiheadAttention(64, 4), [(12, 4, 64), (20, 4, 64), (20, 4, 64)]),
}
# Largest error over the largest value: a few roundings of 8 and of 11 bits.
TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 1e-2}


def pair(case: str, factored: bool, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """A low-rank layer on the device, and the dense layer that it stands for, in float64 on the CPU."""
    torch.manual_seed(0)
    low = CASES[case][0]()
    for p in low.parameters():
        nn.init.normal_(p, std=0.2)
    assert convert(low, ALL, fraction=0.5)
    dense = merge(copy.deepcopy(low).double())
    for layer in low_rank_layers(low).values():
        layer.crossover = 10.0 if factored else 0.0
        assert layer.factored(64) is factored
    return low.to(device), dense


def run(layer: nn.Module, case: str, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Outputs, then gradients of the inputs for a fixed cotangent, on the CPU in float64."""
    generator = torch.Generator().manual_seed(1)
    held = torch.float64 if dtype == torch.float64 else torch.float32
    xs = [torch.randn(shape, generator=generator).to(device, held) for shape in CASES[case][1]]
    for x in xs:
        x.requires_grad_()
    arguments = xs * 3 if isinstance(layer, nn.MultiheadAttention) and len(xs) == 1 else xs
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float64):
        result = layer(*arguments)
    out = [y for y in (result if isinstance(result, tuple) else (result,)) if y is not None]
    cotangents = [torch.randn(y.shape, generator=generator).to(device) for y in out]
    sum((y.to(held) * c.to(held)).sum() for y, c in zip(out, cotangents, strict=True)).backward()
    return [t.detach().cpu().double() for t in (*out, *(x.grad for x in xs if x.grad is not None))]


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["bf16", "fp16"])
@pytest.mark.parametrize("factored", [True, False], ids=["factored", "merged"])
@pytest.mark.parametrize("case", CASES)
def test_a_layer_under_autocast(case: str, factored: bool, dtype: torch.dtype, device: torch.device) -> None:
    low, dense = pair(case, factored, device)
    got = run(low, case, dtype, device)
    expected = run(dense, case, torch.float64, torch.device("cpu"))
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        assert error(ours, theirs) < TOLERANCE[dtype]
    weights = dict(dense.named_parameters())
    for name, layer in low_rank_layers(low).items():
        assert layer.U.grad is layer.Vh.grad is None
        assert layer.S.grad is not None
        assert layer.S.grad.dtype == torch.float32
        key = next(key for key in (f"{name}.weight".lstrip("."), f"{name}_weight") if key in weights)
        grad = weights[key].grad
        assert grad is not None
        U, Vh = layer.U.cpu().double(), layer.Vh.cpu().double()
        projected = U.mT @ grad.reshape(layer.m, layer.n) @ Vh.mT
        assert error(layer.S.grad.cpu().double(), projected) < TOLERANCE[dtype]
