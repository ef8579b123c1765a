"""The committed run on an H100: what it holds, for the README's tables and for `predict.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.common import Row
from benchmarks.pages.tables import load, table

NAME = "gpu_nvidia_h100_80gb_hbm3"
TOKENS = 50_432
PARTS = (2, 4, 8)
# Of the README: between those that it shows.
LEFT_OUT = ("bf16 params, compiled blocks", "bf16 params", "cuda graph")


def rows(section: str) -> list[Row]:
    """Of one section."""
    found: list[Row] = load(NAME)["sections"][section]["rows"]
    return found


def card(what: str) -> Row:
    """A row of the card's own speeds."""
    return next(row for row in rows("card") if row["what"] == what)


def layer(m: int, n: int, part: int, variant: str, tokens: int = TOKENS) -> Row | None:
    """At r = k / part."""
    wanted = (m, n, min(m, n) // part, tokens, variant)
    return next((row for row in rows("layer") if tuple(row[key] for key in _KEYS) == wanted), None)


_KEYS = ("m", "n", "r", "tokens", "variant")


def way(row: Row) -> str:
    """How a step ran, in the words of the settings; a graph that could not be captured is none."""
    mode, graph = row["mode"], row["method"].endswith("graph")
    parts = (
        "`bf16-params`" if "bf16 params" in mode else "bf16 autocast",
        *("compiled blocks",) * ("compiled" in mode),
    )
    return ", ".join((*parts, *("CUDA graph",) * graph))


def pairs() -> Iterator[tuple[Row, Row]]:
    """Steps, dense and at r = k/4."""
    first = [row for row in rows("step") if not row["repeated"]]
    dense = {tuple(row[key] for key in _OF_STEP): row for row in first if row["r_over_k"] is None}
    return ((dense[tuple(row[key] for key in _OF_STEP)], row) for row in first if row["r_over_k"] == 0.25)


_OF_STEP = ("model", "optimizer", "mode")


def fastest(model: str, r_over_k: float | None) -> Row:
    """The fastest step of a model in any mode."""
    mine = [row for row in rows("step") if (row["model"], row["r_over_k"]) == (model, r_over_k)]
    return min(mine, key=lambda row: row["ms"])


def own_gib(row: Row) -> float:
    """The peak without what earlier sections held."""
    gib: float = row["peak_gib"] - row["held_before_gib"]
    return gib


def event(model: str, what: str, r_over_k: float, svd: str = "Gram matrix") -> Row | None:
    """A conversion or an update."""
    wanted = (model, what, r_over_k, svd)
    keys = ("model", "event", "r_over_k", "svd")
    return next((row for row in rows("update") if tuple(row[key] for key in keys) == wanted), None)


def number(row: Row | None, key: str = "time_ratio") -> str:
    """Two decimals, or a dash for what was not run."""
    return "-" if row is None else f"{row[key]:.2f}"


def summary() -> str:
    """The README's tables."""
    shapes = dict.fromkeys((row["m"], row["n"]) for row in rows("layer"))
    layers = [
        [f"{m} x {n}", *(number(layer(m, n, part, "folded", tokens)) for tokens in (TOKENS, 8192) for part in PARTS)]
        for m, n in shapes
    ]
    columns = [f"r = k/{part}, {tokens:,} tokens" for tokens in (TOKENS, 8192) for part in PARTS]
    steps = [
        [
            low["model"],
            low["optimizer"],
            way(low),
            f"{dense['ms']:.0f} ms",
            f"{low['ms']:.0f} ms",
            number(low),
            f"{low['spread']:.0%}",
            f"{own_gib(low) / own_gib(dense):.2f}",
        ]
        for dense, low in sorted(pairs(), key=lambda pair: (pair[0]["model"], pair[1]["ms"]))
        if low["mode"] not in LEFT_OUT
    ]
    events = [
        [model, what, f"k/{1 / r:.0f}", number(event(model, what, r), "seconds"), number(other, "seconds")]
        for model in ("ViT-B/16", "Llama-like 350M")
        for what, r in (("conversion", 0.5), ("update", 0.5), ("update", 0.25), ("update", 0.125))
        for other in [event(model, what, r, "gesvdj")]
    ]
    step_columns = (
        "model",
        "optimizer",
        "precision and mode",
        "dense",
        "r = k/4",
        "time / dense",
        "scatter of r = k/4",
        "peak memory / dense",
    )
    content: dict[str, Any] = load(NAME)
    environment = content["environment"]
    return "\n\n".join((
        "A layer with folded core, forward and backward in bf16, time over dense:",
        table(["layer", *columns], layers),
        "Training steps (scatter: between the 10th and the 90th percentile; a smaller difference is noise):",
        table(step_columns, steps),
        "Conversion and update of all layers, in seconds:",
        table(("model", "", "r", "package's SVDs", "gesvdj"), events),
        f"*`benchmarks/results/{NAME}.json`: {content['card']}, torch {environment['packages']['torch']}, "
        f"{environment['date'][:10]}.*",
    ))  # fmt: skip
