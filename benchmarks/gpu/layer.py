"""One linear layer in bf16, forward and backward: every variant in turn with ``nn.Linear``, at every shape and r.

Of each variant: the time over the dense one's, the same ratio of what the roofline allows and of the operations
counted, and the error of its results against float64. Inputs alternate between sets that do not fit the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common import Row
from benchmarks.gpu.card import peaks
from benchmarks.gpu.layer_variants import VARIANTS, Built, Factors
from benchmarks.gpu.runner import Case, Context
from benchmarks.gpu.timing import Timing, interleaved

DTYPE = torch.bfloat16
# (m, n) of ViT-B's layers and of wider ones; tokens of 256 images, and of 8 x 1,024.
SHAPES = ((768, 768), (3072, 768), (2048, 2048), (768, 3072), (8192, 2048))
TOKENS = (50_432, 8_192)
FRACTIONS = (0.25, 0.125, 0.5, 0.375, 0.75)
# bf16 operands and fp32 accumulation leave 1e-3 to 1e-2.
WORST_ERROR = 0.03


@dataclass(frozen=True)
class Shape:
    """A layer of n inputs and m outputs at r, and the rows of its input."""

    m: int
    n: int
    r: int
    tokens: int

    @property
    def fraction(self) -> float:
        """r over k."""
        return self.r / min(self.m, self.n)


def cases(context: Context) -> Sequence[Case]:
    """The grid, and one odd r a shape: what becomes of products that do not fill the tiles."""
    if context.tiny:
        shapes = [Shape(48, 32, 8, 64)]
    else:
        shapes = [Shape(m, n, round(f * min(m, n)), tokens) for tokens in TOKENS for f in FRACTIONS for m, n in SHAPES]
        shapes += [Shape(m, n, min(m, n) // 4 + 1, TOKENS[0]) for m, n in SHAPES]
    return [Case(f"{s.m} x {s.n}, r = {s.r}, {s.tokens} tokens", _case(s, context)) for s in shapes]


def _case(shape: Shape, context: Context) -> Callable[[], Iterator[Row]]:
    return lambda: measure(shape, context)


def measure(shape: Shape, context: Context) -> Iterator[Row]:
    """A row for each variant; one that fails says so and leaves the others alone."""
    device = context.device
    factors = Factors.random(shape.m, shape.n, shape.r, device, DTYPE)
    inputs = input_sets(shape, device)
    reference = exact(factors, *inputs[0])
    errors: dict[str, float | str] = {}
    built: dict[str, Built] = {}
    for name, variant in VARIANTS.items():
        if variant.quarter_only and shape.fraction != 0.25:
            continue
        try:
            built[name] = variant.build(factors)
            errors[name] = worst_error(built[name], inputs[0], reference, factors)
        except Exception as error:
            # A kernel may not take every shape; that is a result, too.
            built.pop(name, None)
            if name == "dense":
                raise
            errors[name] = f"{type(error).__name__}: {str(error)[:200]}"
    del reference
    calls = {name: _call(variant, inputs) for name, variant in built.items()}
    timings = interleaved(calls, device, sets=len(inputs), seconds=0.02 if context.tiny else 0.35)
    for name, found in errors.items():
        yield _row(name, shape, found, timings, context)


def input_sets(shape: Shape, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Pairs of input and output gradient, together three times the L2 cache where 16 pairs suffice, at least two."""
    size = shape.tokens * (shape.m + shape.n) * DTYPE.itemsize
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    count = min(16, max(2, -(-3 * cache // size)))
    return [
        (
            torch.randn(shape.tokens, shape.n, device=device, dtype=DTYPE, requires_grad=True),
            torch.randn(shape.tokens, shape.m, device=device, dtype=DTYPE),
        )
        for _ in range(count)
    ]


def _call(built: Built, inputs: Sequence[tuple[Tensor, Tensor]]) -> Callable[[int], object]:
    return lambda i: results(built, *inputs[i])


def results(built: Built, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients of input, weight (or core) and bias."""
    y = built.forward(x)
    return (y.detach(), *torch.autograd.grad(y, (x, *built.trained), dy))


@torch.no_grad()
def exact(factors: Factors, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """:func:`results` of a variant with a core, in float64 from the same rounded numbers."""
    U, S, Vh, bias, x, dy = (t.double() for t in (factors.U, factors.S, factors.Vh, factors.bias, x, dy))
    a, db = x @ Vh.mT, dy @ U
    return a @ S.mT @ U.mT + bias, db @ S @ Vh, db.mT @ a, dy.sum(0)


@torch.no_grad()
def worst_error(built: Built, inputs: tuple[Tensor, Tensor], reference: tuple[Tensor, ...], factors: Factors) -> float:
    """Largest of ``||out - ref|| / ||ref||`` over output and gradients; NaN never passes as small."""
    with torch.enable_grad():
        found = list(results(built, *inputs))
    if not built.core:
        # A dense weight's gradient in the core's basis.
        U, Vh = factors.U.double(), factors.Vh.double()
        found[2] = U.mT @ found[2].double() @ Vh.mT
    pairs = zip(found, reference, strict=True)
    errors = [float((out.double() - ref).norm() / ref.norm()) for out, ref in pairs]
    return max(errors, key=lambda e: e if e == e else float("inf"))


def _row(name: str, shape: Shape, error: float | str, timings: dict[str, Timing], context: Context) -> Row:
    m, n, r, tokens = shape.m, shape.n, shape.r, shape.tokens
    row: Row = {
        "m": m,
        "n": n,
        "r": r,
        "r_over_k": round(shape.fraction, 4),
        "tokens": tokens,
        "variant": name,
    }
    if isinstance(error, str):
        return row | {"failed": error}
    timing, dense = timings[name], timings["dense"]
    floor, dense_floor = floor_ms(name, shape, context), floor_ms("dense", shape, context)
    operations = VARIANTS[name].operations(tokens, m, n, r)
    return row | {
        "ms": timing.ms,
        "spread": timing.spread,
        "time_ratio": timing.ms / dense.ms,
        "roofline_ratio": floor / dense_floor,
        "operation_ratio": operations / VARIANTS["dense"].operations(tokens, m, n, r),
        "floor_ms": floor,
        "tflop_per_s": 2 * operations / timing.ms / 1e9,
        "tb_per_s": DTYPE.itemsize * VARIANTS[name].numbers(tokens, m, n, r) / timing.ms / 1e9,
        "error": error,
        "right": error <= WORST_ERROR,
        "method": timing.method,
    }


def floor_ms(name: str, shape: Shape, context: Context) -> float:
    """The larger of operations over the rate of products and bytes over the rate of copies (ms)."""
    of, ceiling = (shape.tokens, shape.m, shape.n, shape.r), peaks(context.device, context.tiny)
    arithmetic = 2 * VARIANTS[name].operations(*of) / ceiling.tflop_per_s / 1e9
    return max(arithmetic, DTYPE.itemsize * VARIANTS[name].numbers(*of) / ceiling.tb_per_s / 1e9)
