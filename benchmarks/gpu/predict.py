"""What a layer should take on a GPU, and what it took: writes `benchmarks/results/gpu_notes.md` to stdout.

Each product or fused kernel takes the longer of its operations at the rate of large products and its bytes at two thirds
of the speed of copies, both of one card in bf16. Outcomes are read from the committed file (`measured.py`).
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.common import Row
from benchmarks.gpu import measured
from benchmarks.gpu.measured import PARTS, TOKENS, event, fastest, layer, number, pairs, rows, way
from benchmarks.pages.tables import load, table

SHAPES = ((768, 768), (3072, 768), (2048, 2048))
# Measured on an H200 at commit 64dc837: time over dense of the folded core by torch's products, at k/2, k/4 and k/8.
FOLDED_THEN = {
    (768, 768): (1.18, 1.14, 1.02),
    (3072, 768): (0.59, 0.36, 0.30),
    (2048, 2048): (0.91, 0.46, 0.26),
}
# Aimed at: time over the fastest dense run of the same code, and seconds.
LAYER_GOALS = {(768, 768): (0.85, 0.55, 0.40), (3072, 768): (0.50, 0.30, 0.20), (2048, 2048): (0.80, 0.42, 0.22)}
STEP_GOALS = {"ViT-B/16": 0.60, "Llama-like 350M": 0.55, "mini ViT": 0.75}
EVENT_GOALS = {("update", 0.25): 0.15, ("conversion", 0.5): 1.0}
# Parts of kernels' names; the first that fits. Products come before what a compiler fuses into none of them.
KINDS = {
    "products": ("nvjet", "gemm", "_two_products"),
    "attention": ("sdpa", "dot_do_o", "convert_dq"),
    "activations": ("gelu", "Gelu", "silu", "tanh"),
    "norms": ("layer_norm", "GammaBeta", "mul_pow_sum"),
}
# Weights of a block of ViT-B/16 (m, n, how many), of 12 blocks.
VIT_BLOCK = ((768, 768, 4), (3072, 768, 2))


class Card(NamedTuple):
    """Rates of large products in bf16 and of copies."""

    flops_per_s: float
    copied_bytes_per_s: float

    def seconds(self, operations: float, numbers: float) -> float:
        """Of one kernel in bf16."""
        return max(2 * operations / self.flops_per_s, 2 * numbers / (self.copied_bytes_per_s * 2 / 3))

    def product(self, a: int, b: int, c: int) -> float:
        """(a x b) (b x c) by one call."""
        return self.seconds(a * b * c, a * b + b * c + a * c)

    def fused(self, tokens: int, K: int, N: int, r: int) -> float:
        """``t = x P^T`` and ``y = t Q^T`` in one kernel."""
        return self.seconds(tokens * r * (K + N), tokens * (K + N + r) + r * (K + N))

    def ratios(self, m: int, n: int, r: int, tokens: int = TOKENS) -> tuple[float, float]:
        """Time over dense of the folded core by five products, and by two fused kernels and one product."""
        dense = self.product(tokens, n, m) + self.product(tokens, m, n) + self.product(m, tokens, n)
        core = self.product(r, tokens, r)
        five = sum(self.product(tokens, a, b) for a, b in ((n, r), (r, m), (m, r), (r, n))) + core
        return five / dense, (self.fused(tokens, n, m, r) + self.fused(tokens, m, n, r) + core) / dense


H200 = Card(780e12, 4.3e12)


def h100() -> Card:
    """As the committed file has it."""
    return Card(measured.card("product bf16")["tflop_per_s"] * 1e12, measured.card("copy")["tb_per_s"] * 1e12)


def layers() -> str:
    """Predictions beside outcomes."""
    lines, here = [], h100()
    for m, n in SHAPES:
        for part, then in zip(PARTS, FOLDED_THEN[m, n], strict=True):
            r = min(m, n) // part
            operations = (2 * TOKENS * r * (m + n) + TOKENS * r * r) / (3 * TOKENS * m * n)
            predicted = [f"{ratio:.2f}" for card in (H200, here) for ratio in card.ratios(m, n, r)]
            outcome = [number(layer(m, n, part, variant)) for variant in ("folded", "fused")]
            before = [*predicted[:2], f"{then:.2f}"]
            lines.append([f"{m} x {n}", f"k/{part}", f"{operations:.2f}", *before, *predicted[2:], *outcome])
    header = ("folded, predicted", "fused, predicted")
    columns = [f"H200: {header[0]}", header[1], "folded, measured", f"H100: {header[0]}", header[1]]
    return table(["layer", "r", "operations", *columns, "folded, measured", "fused, measured"], lines)


def goals() -> str:
    """What was aimed at and what was reached."""
    lines = []
    for (m, n), wanted in LAYER_GOALS.items():
        for part, goal in zip(PARTS, wanted, strict=True):
            row, dense = layer(m, n, part, "folded"), layer(m, n, part, "dense")
            assert row is not None
            assert dense is not None
            limit = row["floor_ms"] / dense["ms"]
            why = f"{row['tb_per_s']:.1f} TB/s, {row['tflop_per_s']:.0f} TFLOP/s; {limit:.2f} at full speed"
            lines.append([f"layer {m} x {n}, k/{part}", *_judged(row["time_ratio"], goal), why])
    for model, goal in STEP_GOALS.items():
        dense, low = fastest(model, None), fastest(model, 0.25)
        why = f"{low['ms']:.1f} ms ({way(low)}) against {dense['ms']:.1f} ms ({way(dense)})"
        lines.append([f"{model}, k/4", *_judged(low["ms"] / dense["ms"], goal), why])
    for (what, r), goal in EVENT_GOALS.items():
        row, other = event("ViT-B/16", what, r), event("ViT-B/16", what, r, "gesvdj")
        assert row is not None
        why = f"{row['layers']} layers, {row['synchronisations']} waits; {number(other, 'seconds')} s by gesvdj"
        lines.append([f"ViT-B/16, {what} at k/{1 / r:.0f}, s", *_judged(row["seconds"], goal), why])
    return table(("what", "goal", "measured", "", "how"), lines)


def _judged(value: float, goal: float) -> tuple[str, str, str]:
    return f"{goal:.2f}", f"{value:.2f}", "reached" if value <= goal else "missed"


def kernels() -> str:
    """Milliseconds of the longest kernels of each step, by what they do."""
    lines = []
    for pair in pairs():
        for row in pair:
            by_kind = sums(row)
            r = "dense" if row["r_over_k"] is None else "k/4"
            launches = [f"{row['kernels']:,}", f"{1e3 * row['ms'] / row['kernels']:.0f}"]
            times = [f"{ms:.1f}" for ms in (row["ms"], sum(by_kind.values()), *by_kind.values())]
            lines.append([row["model"], way(row), r, *times, *launches, f"{row['spread']:.0%}"])
    header = ("model", "mode", "r", "step", "listed kernels", *KINDS, "rest", "launches", "us", "scatter")
    return table(header, lines)


def sums(row: Row) -> dict[str, float]:
    """Milliseconds for each of :data:`KINDS`, and "rest"."""
    found = dict.fromkeys([*KINDS, "rest"], 0.0)
    for name, ms in row["kernel_ms"].items():
        found[next((kind for kind, parts in KINDS.items() if any(p in name for p in parts)), "rest")] += ms
    return found


def vit_bounds() -> tuple[float, float]:
    """Least time of the products of ViT-B/16's linear layers (ms): dense by operations, at k/4 by bytes."""
    here, r = h100(), 192
    weights = 12 * sum(m * n * count for m, n, count in VIT_BLOCK)
    numbers = 12 * sum((2 * (m + n) + 6 * r) * count for m, n, count in VIT_BLOCK)
    return 1e3 * 6 * TOKENS * weights / here.flops_per_s, 1e3 * 2 * TOKENS * numbers / here.copied_bytes_per_s


HEAD = """# Notes on the GPU's speed: prediction first, outcome beside it

Written by `python -m benchmarks.gpu.predict`. Outcomes are those of `benchmarks/results/{name}.json`, measured at
commit 8f4336b; "before" is the same command at 10ff24d, on another card of this kind. Where "trial" is said, they
are of a script that is not in the repository, so these figures cannot be checked here.

## One layer

Forward and backward, bf16, {tokens:,} tokens, time over dense. Launches: dense 3, three products 7, folded 5 (and 2
small ones that fold), fused 3 (and the same 2). H200: predicted before a fused kernel had run; "folded, measured" is
of commit 64dc837. H100: the same rule, applied afterwards to its {tflops:.0f} TFLOP/s and {tbs:.2f} TB/s.
"""
FUSED = """
**The fused kernels lost.** They ran at k/4, five shapes with two numbers of tokens, and took {low:.1f} to {high:.1f}
times as long as cuBLAS's five products, although they move fewer bytes: the rule takes two thirds of the copy speed
for granted, and at 768 x 768 they moved {fused_tbs:.1f} TB/s. In the trial none of six tiles at 768 x 768, r = 192
beat cuBLAS: the forward pass took .17 ms at best, .10 ms by two calls of cuBLAS. The likely reason, not shown by a
profile: the r-wide fp32 tile fills the registers, so one block runs on a multiprocessor and its loads are not hidden.
Autotuning made the first step take 69 s (trial) and is gone. The package chose the kernel at 768 x 768,
k/4 before by a measurement of its own, and was slower by it (.95 of dense, folded .77). Since then cards of
capability 9.0 use cuBLAS without trying: {factored} now, "folded" {folded}.

## What was aimed at

Layers have their core folded. "At full speed": the bytes or operations of the folded products at the card's rates,
over the measured dense time. Steps are compared with the fastest dense step of the model in any mode.
"""
STEPS = """
Thin products reach neither the rate of large products nor the speed of copies; dense ones are near the former. At
3072 x 768, k/8 the goal asks for more than the folded products could give at full speed.

## Steps

Milliseconds. The file keeps the 16 longest kernels of a step; general elementwise kernels of eager mode count as
"rest". "us" is the step's time over its launches; a bare launch takes {eager:.1f} us from Python and {graph:.1f} us
in a graph.
"""
OUTCOME = """
- **ViT-B/16: {vit:.2f}, goal .60.** In a CUDA graph of compiled blocks the step is {step:.1f} ms, {idle:.1f} ms
  longer than its 16 longest kernels. Products take {dense:.1f} ms dense, of which {dense_bound:.1f} ms are due at
  the rate of large products. At k/4 they take {low:.1f} ms, of which {low_bound:.1f} ms are due for the bytes of
  the linear layers, 2 (m + n) + 6 r numbers a token, at the speed of copies: they can give {left:.1f} ms more, to
  {bound:.2f}. Attention (cuDNN's kernels), GELU, norms and residuals are the same in both steps, so even with free
  products it would be {free:.2f}.
- **The dense step of at most 65 ms was missed too:** {fastest:.1f} ms.
- **Llama-like: missed by little** ({llama:.3f}): products take {llama_products:.1f} of {llama_ms:.1f} ms at k/4.
- **Mini ViT: {mini_ratio:.2f} by AdamW, {mini_muon:.2f} by Muon**, which its recipe uses, both sides in a graph;
  goal .75. Of {mini:.1f} ms at k/4, products are {mini_products:.1f}; eager it takes {mini_eager:.1f} ms, bound by
  launches.
- **GPT-2 gains little.** {gpt_head:.1f} ms of its step are kernels for unaligned data (`align1` in their names), as
  long in the dense step: those of the head, whose vocabulary of 50,257 is odd.
- **Masks in graphs.** Before, the capture of compiled blocks failed for both ViTs and GPT-2, and a captured mini
  ViT took as long as an eager one (trial). A script on the card said why: transformers 5.17 builds attention masks
  while a stream is being captured, with which attention leaves its fast kernels and blocks are compiled anew, in
  the capture. The package's models now attend without masks; all four were captured in every mode ({errors} errors;
  {left_out} cases had no time left). `train.cuda_graph: auto` captures compiled blocks since. That replayed losses
  are those of eager steps is what `tests/gpu/test_cuda_graph.py` compares.
- **Half of before's eager steps at low rank were slow by the machine**: ViT-B/16 under autocast took 91.1 ms with
  32 % scatter, {vit_eager:.1f} now; the dense one 101.9 and {vit_dense:.1f}.

## Muon's step

On 64 cores, r from 129 to 192, and one 768 x 768 weight: 1,261 launches with a batch for each shape, 191 with cores
padded to 192 in one batch, of which 127 copy cores into it and out of it (counted in `tests/optim/test_muon.py`).
Predicted in eager mode, at 5 us a launch: 6.3 and 1.0 ms. Measured, in a graph, as what a step by Muon takes more
than one by AdamW: ViT-B/16 {muon_dense:.1f} ms dense, {muon_low:.1f} ms at k/4; Llama-like {muon_llama_dense:.1f}
and {muon_llama:.1f} ms. So against Muon, the better optimizer here, low rank pays more: {muon_vit:.2f} and
{muon_llama_ratio:.2f}.

## Update and conversion of ViT-B/16

Predicted with eigenvectors of Gram matrices, those of an update on 16 host cores: .11 s for an update at k/4, .16 s
at k/2, .7 s for the conversion. Measured: {update4:.2f}, {update2:.2f} and {conversion:.2f} s (before: .22, .47 and
.96); {update4_then:.2f}, {update2_then:.2f} and {conversion_then:.2f} s by gesvdj. **Both goals are reached.** SVDs
are gesvda in float64, on the GPU and a batch at once. A profile of one update at k/4 in a trial: 17 ms of kernels
in 103 ms, the rest is the host, of it 16 ms in the call of the batched SVD and 63 ms where 72 layers get their new
bases and moments. The conversion's peak was {conversion_gib:.1f} GiB, {conversion_then_gib:.1f} by gesvdj and
{dense_gib:.1f} in a dense step of the optimizer. The update of the Llama-like model by gesvdj failed: its bases
were orthonormal to .001 only, so gesvdj, where it is the fall-back, is checked since and gesvd takes its place."""

NOT_BUILT = """
## Considered, and not built

**Updates beside the next step** (SVDs of a snapshot of the cores on a side stream, applied a step later). The share
of a run that all updates take, by the fastest step and the update of the same r, at a `frequency` of 100, 500 and
2,000:
"""
NOT_BUILT_ENDS = """
`vit_b16.yaml` updates every 2,000 steps, so {vit:.2%} of the run could be saved at most, and not all of that: of an
update of {update:.0f} ms most changes factors and moments between two steps. The Llama-like model at r = k/4 pays
for updates every 100 steps; every 2,000 they are {llama:.1%}. What of that a side stream would hide, beside a step
on the same card, is not measured. It would need a process group of its own, a rotation of cores that are not
diagonal afterwards, and the snapshot in checkpoints; a larger `frequency` needs nothing.

**JPEGs decoded on the GPU** (nvJPEG). Images differ in size, so that crop, antialiased resize in both directions,
flip and copy into the batch are at least {per_image} launches an image: {launches:,} for the {batch} of a step of
ViT-B/16, {launch_ms:.1f} ms of the host at {eager:.1f} us each, beside a step of {step:.0f} ms. Loader processes do
this work on other cores, and let the decoder halve large images first. Pixels would differ in their last bits from
Pillow's, so that the same run would depend on the machine. Not measured."""
FREQUENCIES = (100, 500, 2000)
# Of a step of ViT-B/16, and the least launches for each of them.
IMAGES, IMAGE_LAUNCHES = 256, 5


def filled(text: str) -> str:
    """Paragraphs, headings and items of a list, wrapped."""
    blocks = []
    for block in re.split(r"\n(?=\n|- |#)", text):
        indent = "  " if block.startswith("- ") else ""
        words = " ".join(block.split())
        wrapped = textwrap.fill(words, 118, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
        blocks.append("\n" * block.startswith("\n") + wrapped)
    return "\n".join(blocks) + "\n" * text.endswith("\n")


def lines() -> Iterator[str]:
    """The notes."""
    here = h100()
    by_key: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in rows("layer"):
        by_key.setdefault(tuple(row[key] for key in ("m", "n", "r", "tokens")), {})[row["variant"]] = row
    lost = [found["fused"]["ms"] / found["folded"]["ms"] for found in by_key.values() if "fused" in found]
    tflops, tbs = here.flops_per_s / 1e12, here.copied_bytes_per_s / 1e12
    yield filled(HEAD.format(name=measured.NAME, tokens=TOKENS, tflops=tflops, tbs=tbs))
    yield layers()
    square = by_key[768, 768, 192, TOKENS]
    chosen = {variant: number(square[variant]) for variant in ("factored", "folded")}
    yield filled(FUSED.format(low=min(lost), high=max(lost), fused_tbs=square["fused"]["tb_per_s"], **chosen))
    yield goals()
    launch = measured.card("launch")
    yield filled(STEPS.format(eager=launch["eager_us"], graph=launch["graph_us"]))
    yield kernels()
    yield filled(OUTCOME.format(**outcome()))
    yield filled(NOT_BUILT)
    yield table(("model", "r", "update, s", "step, ms", *(f"{every:,}" for every in FREQUENCIES)), updates())
    yield filled(NOT_BUILT_ENDS.format(eager=launch["eager_us"], **not_built(launch["eager_us"])))


def share(model: str, r: float, every: int) -> float:
    """Of a run's time in its updates of one r, every so many steps."""
    row = event(model, "update", r)
    assert row is not None
    return float(row["seconds"] / (row["seconds"] + every * fastest(model, r)["ms"] / 1e3))


def updates() -> list[list[str]]:
    """What updates take of a run, by model and r."""
    lines = []
    for model in ("ViT-B/16", "Llama-like 350M"):
        for r in sorted({row["r_over_k"] for row in rows("step") if row["model"] == model} - {None}, reverse=True):
            row, shares = event(model, "update", r), [f"{share(model, r, every):.1%}" for every in FREQUENCIES]
            lines.append([model, f"k/{1 / r:.0f}", number(row, "seconds"), f"{fastest(model, r)['ms']:.1f}", *shares])
    return lines


def not_built(eager_us: float) -> dict[str, Any]:
    """Figures of what was considered."""
    update = event("ViT-B/16", "update", 0.25)
    assert update is not None
    launches = IMAGE_LAUNCHES * IMAGES
    return {
        "vit": share("ViT-B/16", 0.25, 2000),
        "llama": share("Llama-like 350M", 0.25, 2000),
        "update": 1e3 * update["seconds"],
        "per_image": IMAGE_LAUNCHES,
        "launches": launches,
        "batch": IMAGES,
        "launch_ms": launches * eager_us / 1e3,
        "step": fastest("ViT-B/16", 0.25)["ms"],
    }


def outcome() -> dict[str, Any]:
    """Figures of the last part."""
    dense, low = fastest("ViT-B/16", None), fastest("ViT-B/16", 0.25)
    by_kind, (dense_bound, low_bound) = sums(low), vit_bounds()
    mini, llama, gpt = (fastest(model, 0.25) for model in ("mini ViT", "Llama-like 350M", "GPT-2 124M"))
    section = load(measured.NAME)["sections"]["step"]

    def step(model: str, r_over_k: float | None, optimizer: str, mode: str = "bf16 params, cuda graph") -> float:
        wanted = (model, r_over_k, optimizer, mode)
        keys = ("model", "r_over_k", "optimizer", "mode")
        return float(next(row["ms"] for row in section["rows"] if tuple(row[key] for key in keys) == wanted))

    def muon(model: str, r_over_k: float | None) -> float:
        return step(model, r_over_k, "Muon") - step(model, r_over_k, "AdamW")

    def ratio(model: str) -> float:
        return step(model, 0.25, "Muon") / step(model, None, "Muon")

    found: dict[str, Any] = {
        "errors": len(section["errors"]),
        "left_out": len(section["left out"]),
        "vit": low["ms"] / dense["ms"],
        "dense": sums(dense)["products"],
        "dense_bound": dense_bound,
        "low": by_kind["products"],
        "low_bound": low_bound,
        "left": by_kind["products"] - low_bound,
        "bound": (low["ms"] - by_kind["products"] + low_bound) / dense["ms"],
        "free": (low["ms"] - by_kind["products"]) / dense["ms"],
        "step": low["ms"],
        "idle": low["ms"] - sum(by_kind.values()),
        "fastest": dense["ms"],
        "llama": llama["ms"] / fastest("Llama-like 350M", None)["ms"],
        "llama_ms": llama["ms"],
        "llama_products": sums(llama)["products"],
        "mini": mini["ms"],
        "mini_products": sums(mini)["products"],
        "mini_ratio": mini["ms"] / fastest("mini ViT", None)["ms"],
        "mini_muon": ratio("mini ViT"),
        "mini_eager": step("mini ViT", 0.25, "AdamW", "eager"),
        "vit_eager": step("ViT-B/16", 0.25, "AdamW", "eager"),
        "vit_dense": step("ViT-B/16", None, "AdamW", "eager"),
        "gpt_head": sum(ms for name, ms in gpt["kernel_ms"].items() if "align1" in name),
        "muon_dense": muon("ViT-B/16", None),
        "muon_low": muon("ViT-B/16", 0.25),
        "muon_llama_dense": muon("Llama-like 350M", None),
        "muon_llama": muon("Llama-like 350M", 0.25),
        "muon_vit": ratio("ViT-B/16"),
        "muon_llama_ratio": ratio("Llama-like 350M"),
    }
    events = {"update4": ("update", 0.25), "update2": ("update", 0.5), "conversion": ("conversion", 0.5)}
    for name, (what, r) in events.items():
        for suffix, svd in (("", "Gram matrix"), ("_then", "gesvdj")):
            row = event("ViT-B/16", what, r, svd)
            assert row is not None
            found[name + suffix], found[f"{name}{suffix}_gib"] = row["seconds"], row["peak_gib"]
            found["dense_gib"] = row.get("dense_gib")
    return found


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
