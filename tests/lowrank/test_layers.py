"""Every layer kind against its dense twin: forward, gradients, factored = merged, fp32, fp64, bf16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hpc_oialr.lowrank import LowRankWeight, Selection, convert, low_rank_layers

ALL = Selection(keep_last=False, max_aspect=100)
Build = Callable[[], nn.Module]


def attention(**options: Any) -> Build:
    return lambda: nn.MultiheadAttention(16, 4, **options)


# name: (layer, shapes of its inputs; one shape for self-attention is query = key = value)
CASES: dict[str, tuple[Build, list[tuple[int, ...]]]] = {
    "linear": (lambda: nn.Linear(12, 8), [(5, 3, 12)]),
    "linear without bias": (lambda: nn.Linear(8, 12, bias=False), [(40, 8)]),
    "transformers Conv1D": (lambda: Conv1D(24, 8), [(4, 6, 8)]),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3, padding="same", dilation=2), [(2, 6, 12)]),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), [(2, 6, 9, 9)]),
    "conv2d reflected": (lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), [(2, 6, 7, 7)]),
    "conv2d unbatched": (lambda: nn.Conv2d(6, 8, 3), [(6, 7, 7)]),
    "conv3d": (lambda: nn.Conv3d(3, 6, 2), [(2, 3, 5, 5, 5)]),
    "self-attention": (attention(), [(5, 3, 16)]),
    "self-attention unbatched": (attention(), [(5, 16)]),
    "cross-attention": (attention(), [(5, 3, 16), (7, 3, 16), (7, 3, 16)]),
    "batch first": (attention(batch_first=True), [(3, 5, 16), (3, 7, 16), (3, 7, 16)]),
    "attention without bias": (attention(bias=False), [(5, 3, 16)]),
    "bias_kv and zero": (
        attention(add_bias_kv=True, add_zero_attn=True),
        [(5, 3, 16), (7, 3, 16), (7, 3, 16)],
    ),
    "separate projections": (attention(kdim=10, vdim=6), [(5, 3, 16), (7, 3, 10), (7, 3, 6)]),
}
TUCKER = ", Tucker form"
CASES |= {name + TUCKER: case for name, case in CASES.items() if name.startswith("conv")}
# Errors relative to the largest value; bf16 has 8 bits, and three products instead of one.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 6e-2}


def pair(case: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A dense layer and its low-rank twin at r = k."""
    torch.manual_seed(0)
    dense = CASES[case][0]().to(dtype)
    for p in dense.parameters():
        nn.init.normal_(p, std=0.5)
    low = copy.deepcopy(dense)
    assert convert(low, ALL, conv="tucker" if case.endswith(TUCKER) else "flattened")
    return dense, low


def run(layer: nn.Module, case: str, dtype: torch.dtype, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """All outputs, and the gradients of the inputs for a fixed random cotangent."""
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in CASES[case][1]]
    arguments = xs * 3 if isinstance(layer, nn.MultiheadAttention) and len(xs) == 1 else xs
    result = layer(*arguments, **options)
    out = [y for y in (result if isinstance(result, tuple) else (result,)) if y is not None]
    loss = sum((y * torch.randn(y.shape, generator=generator).to(dtype)).sum() for y in out)
    assert isinstance(loss, Tensor)
    loss.backward()
    return out, [x.grad for x in xs if x.grad is not None]


def assert_close(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        error = float((a - b).detach().abs().max() / b.detach().abs().max())
        assert error < TOLERANCE[dtype], error


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("factored", [True, False], ids=["factored", "merged"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_equal_the_dense_twin(case: str, factored: bool, dtype: torch.dtype) -> None:
    dense, low = pair(case, dtype)
    layers = low_rank_layers(low)
    for layer in layers.values():
        layer.crossover = 10.0 if factored else 0.0
        assert layer.factored(64) is factored
    expected, got = run(dense, case, dtype), run(low, case, dtype)
    assert_close(got[0], expected[0], dtype)
    assert_close(got[1], expected[1], dtype)
    for name, layer in layers.items():
        assert layer.U.grad is None
        assert layer.Vh.grad is None
        W_grad = dense_gradient(dense, name)
        right = layer.Vh.mT
        if case.endswith(TUCKER):
            right = torch.kron(right.contiguous(), torch.eye(layer.n // layer.columns, dtype=dtype))
        projected = layer.U.mT @ W_grad.reshape(layer.m, layer.n) @ right
        assert layer.S.grad is not None
        assert_close([layer.S.grad], [projected], dtype)


def dense_gradient(dense: nn.Module, name: str) -> Tensor:
    """Gradient of the dense weight that became the low-rank layer ``name``."""
    parameters = dict(dense.named_parameters())
    key = next(k for k in (f"{name}.weight".lstrip("."), f"{name}_weight") if k in parameters)
    grad = parameters[key].grad
    assert grad is not None
    return grad


MASKS: dict[str, dict[str, Any]] = {
    "boolean": {"attn_mask": torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.7},
    "float per head": {"attn_mask": torch.randn(12, 5, 7, dtype=torch.float64)},
    "padding": {"key_padding_mask": torch.arange(7)[None] >= torch.tensor([7, 5, 3])[:, None]},
    "both": {
        "attn_mask": torch.ones(5, 7).triu(4).bool(),
        "key_padding_mask": torch.arange(7)[None] >= torch.tensor([7, 5, 3])[:, None],
    },
    "causal hint": {"attn_mask": torch.ones(5, 7).triu(1).bool(), "is_causal": True},
    "weights per head": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
}


# torch itself warns when a boolean padding mask meets a float mask; none of these cases does that.
@pytest.mark.parametrize("case", ["cross-attention", "bias_kv and zero"])
@pytest.mark.parametrize("mask", MASKS)
def test_attention_masks_and_options(case: str, mask: str) -> None:
    dense, low = pair(case, torch.float64)
    expected, got = (
        run(dense, case, torch.float64, **MASKS[mask]),
        run(low, case, torch.float64, **MASKS[mask]),
    )
    assert_close(got[0], expected[0], torch.float64)
    assert_close(got[1], expected[1], torch.float64)


def test_causal_hint_without_a_mask_is_refused_as_by_torch() -> None:
    _, low = pair("self-attention", torch.float32)
    x = torch.randn(5, 3, 16)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        low(x, x, x, is_causal=True)


@pytest.mark.parametrize("padding", [False, True])
def test_transformer_encoder_inference(padding: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    low = copy.deepcopy(encoder)
    convert(low, ALL)
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5)[None] >= torch.tensor([5, 5, 3])[:, None] if padding else None
    with torch.no_grad():
        expected = encoder.layers[1](encoder.layers[0](x, src_key_padding_mask=mask), src_key_padding_mask=mask)
        got = low(x, src_key_padding_mask=mask)
    keep = slice(None) if mask is None else ~mask
    torch.testing.assert_close(got[keep], expected[keep], rtol=0, atol=1e-4)


def test_autocast_runs_in_bf16_and_trains_fp32_cores() -> None:
    dense, low = pair("linear", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = low(torch.ones(4, 12)), dense(torch.ones(4, 12))
    assert y.dtype == expected.dtype == torch.bfloat16
    y.float().sum().backward()
    assert isinstance(low, LowRankWeight)
    assert low.S.grad is not None
    assert low.S.grad.dtype == torch.float32


def test_factored_execution_keeps_r_not_n_numbers_per_token() -> None:
    """The memory claim: autograd saves x Vh^T (B x r), not x (B x n)."""
    low = nn.Linear(64, 64)
    convert(low, ALL, fraction=0.125)
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.numel())
        return x

    x = torch.randn(100, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        low(x)
    assert 100 * 8 in saved
    assert 100 * 64 not in saved
