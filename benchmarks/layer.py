"""One layer, forward and backward: factored against dense, and the published scheme that rebuilds W.

Ratios are to the dense layer, torch's `nn.Linear`, measured in turn in one run. `time_ratio` is this
project's low-rank layer, `linear_ratio` the same products by `torch.nn.functional.linear`, `rebuild_ratio`
the layer building `W = U S Vh` in every forward pass, `flop_ratio` what the operation counts promise.
`dense_onednn_ratio` is a dense layer whose output and input gradient go through oneDNN, as the low-rank
layer's products do in fp32 on CPUs with AVX-512. `products_ratio` is the matrix products of the folded layer
alone, by torch: what the library behind them needs for such thin matrices. `oialr.crossover` accepts the result file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common import Row, arguments, finish, time_ratios
from hpc_oialr.lowrank import Selection, convert
from hpc_oialr.lowrank.execution import dense_cost, factored_cost, measured_crossover
from hpc_oialr.lowrank.layers import LowRankLinear
from hpc_oialr.torch_compat import onednn_linear

Forward = Callable[[nn.Module, Tensor], Tensor]
SHAPES = ((768, 768), (3072, 768))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.125)


def low_rank_twin(dense: nn.Linear, fraction: float, *, factored: bool) -> LowRankLinear:
    """A converted copy, forced into one kind of execution."""
    twin = copy.deepcopy(dense).float()
    convert(twin, Selection(keep_last=False), fraction=fraction)
    twin = twin.to(dense.weight.dtype)
    assert isinstance(twin, LowRankLinear)
    twin.crossover = 1e9 if factored else 0.0
    return twin


def measure(m: int, n: int, fraction: float, dtype: torch.dtype, tokens: int, repeats: int) -> Row:
    """One row."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = nn.Linear(n, m).to(device, dtype)
    layers = {
        "dense": dense,
        "factored": low_rank_twin(dense, fraction, factored=True),
        "rebuild": low_rank_twin(dense, fraction, factored=False),
    }
    x = torch.randn(tokens, n, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn(tokens, m, device=device, dtype=dtype)
    steps = {name: (lambda layer=layer: step(layer, x, dy)) for name, layer in layers.items()}
    steps["linear"] = lambda: step(layers["factored"], x, dy, three_linear_layers)
    steps["products"] = lambda: folded_products(layers["factored"], x.detach(), dy)
    # Without AVX-512 oneDNN has no products in bf16.
    by_onednn = device == "cpu" and (dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if by_onednn:
        steps["dense oneDNN"] = lambda: step(dense, x, dy, dense_by_onednn)
    ratios, dense_s = time_ratios(steps, "dense", repeats=repeats)
    r = int(fraction * min(m, n))
    return {
        "m": m,
        "n": n,
        "r": r,
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "time_ratio": ratios["factored"],
        "flop_ratio": factored_cost(tokens, m, n, r) / dense_cost(tokens, m, n),
        "rebuild_ratio": ratios["rebuild"],
        "linear_ratio": ratios["linear"],
        "products_ratio": ratios["products"],
        "dense_onednn_ratio": ratios["dense oneDNN"] if by_onednn else None,
        "dense_ms": 1e3 * dense_s,
    }


def folded_products(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """The six products of a pass with the core folded into the bases, and the bias with its gradient."""
    assert isinstance(layer, LowRankLinear)
    with torch.no_grad():
        a = F.linear(x, layer.Vh)
        y = F.linear(a, layer.U @ layer.S, layer.bias)
        db = dy @ layer.U
        return y, db @ (layer.S @ layer.Vh), db.mT @ a, dy.sum(0)


def three_linear_layers(layer: nn.Module, x: Tensor) -> Tensor:
    """Factored execution by torch's own products."""
    assert isinstance(layer, LowRankLinear)
    return F.linear(F.linear(F.linear(x, layer.Vh), layer.S), layer.U, layer.bias)


def dense_by_onednn(layer: nn.Module, x: Tensor) -> Tensor:
    """``nn.Linear`` with oneDNN for ``y`` and ``dx``; ``dW`` is torch's, which is faster there."""
    result: Tensor = _OneDNNLinear.apply(x, layer.weight, layer.bias)
    return result


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return onednn_linear(dy, weight.mT), dy.mT @ x, dy.sum(0)


def step(layer: nn.Module, x: Tensor, dy: Tensor, forward: Forward | None = None) -> None:
    """Forward and backward, gradients dropped as after an optimizer step."""
    (layer(x) if forward is None else forward(layer, x)).backward(dy)
    layer.zero_grad(set_to_none=True)
    x.grad = None


def main() -> None:
    """Run the grid."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=1576, help="rows of the input: 8 images of ViT-B/16")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        measure(m, n, fraction, dtype, options.tokens, options.repeats)
        for dtype in (DTYPES[name] for name in options.dtypes)
        for m, n in SHAPES
        for fraction in FRACTIONS
    ]
    finish(rows, options.out)
    if options.out is not None:
        print(f"crossover: {measured_crossover(options.out):.3f} (float32)")


if __name__ == "__main__":
    main()
