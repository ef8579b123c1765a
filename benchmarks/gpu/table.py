"""A result file as a page of text: what one wants to know first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.common import Row

# More than this between two models, and one has stayed alive (GiB).
LEFTOVER_GIB = 0.5
Content = Mapping[str, Any]


def lines(content: Content) -> Iterator[str]:
    """Every section's figures, what was left out, and the last line of each error."""
    environment = content["environment"]
    size = ", tiny: figures mean nothing" if content["tiny"] else ""
    yield f"{content['card']}, torch {environment['packages']['torch']}, {environment['date'][:10]}{size}"
    for name, section in content["sections"].items():
        yield f"\n{name} ({section['seconds']:.0f} s, {len(section['rows'])} rows)"
        yield from SHOWN.get(name, _plain)(section["rows"])
        yield from _several("left out", section["left out"])
        for error in section["errors"]:
            yield f"  ERROR {error['case']}: {error['error'].strip().splitlines()[-1]}"


def _several(title: str, items: Sequence[str]) -> Iterator[str]:
    if items:
        more = f" and {len(items) - 3} more" if len(items) > 3 else ""
        yield f"  {title}: {'; '.join(items[:3])}{more}"


def aligned(header: Sequence[str], rows: Iterable[Sequence[object]]) -> Iterator[str]:
    """Columns, the first to the left, floats with three digits."""
    table = [list(header), *([text(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    for line in table:
        cells = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        yield "  " + "  ".join(cells).rstrip()


def text(value: object) -> str:
    """A cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _plain(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        yield "  " + ", ".join(f"{key} {text(value)}" for key, value in row.items())


def _card(rows: Sequence[Row]) -> Iterator[str]:
    keys = ("tb_per_s", "tflop_per_s", "eager_us", "graph_us", "driver_version", "clocks.sm")
    for row in rows:
        yield "  " + ", ".join([row["what"], *(f"{key} {text(row[key])}" for key in keys if key in row)])


def _layer(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each shape and r: every variant's time over dense, then what roofline and count of the best allow."""
    names = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != "dense"]
    found: dict[tuple[int, int, int, int], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["tokens"], row["m"], row["n"], row["r"]), {})[row["variant"]] = row
    table = []
    shapes = list(dict.fromkeys((m, n) for _, m, n, _ in found))
    for (tokens, m, n, r), by_name in sorted(
        found.items(), key=lambda f: (-f[0][0], shapes.index(f[0][1:3]), -f[0][3])
    ):
        done = [by_name[name] for name in names if "time_ratio" in by_name.get(name, {})]
        bounds = [min((row[key] for row in done), default=None) for key in ("roofline_ratio", "operation_ratio")]
        dense_ms = by_name.get("dense", {}).get("ms")
        table.append([f"{m} x {n}", tokens, r, dense_ms, *(_ratio(by_name.get(name)) for name in names), *bounds])
    yield from aligned(["layer", "tokens", "r", "dense ms", *names, "roofline", "operations"], table)


def _ratio(row: Row | None) -> object:
    if row is None:
        return None
    if "failed" in row:
        return "failed"
    mark = "" if row["right"] else " WRONG"
    return f"{row['time_ratio']:.2f}{'' if row['method'] in ('graph', 'eager') else '*'}{mark}"


def _step(rows: Sequence[Row]) -> Iterator[str]:
    header = [
        "model",
        "optimizer",
        "mode",
        "r/k",
        "ms",
        "ratio",
        "samples/s",
        "MFU",
        "kernels",
        "waits",
        "GiB",
    ]
    table = []
    for row in rows:
        r = "dense" + (" again" if row["repeated"] else "") if row["r_over_k"] is None else row["r_over_k"]
        mode = row["mode"] if row["method"] in (row["mode"], "graph") else f"{row['mode']}*"
        figures = [row["ms"], row.get("time_ratio"), row["samples_per_s"], row["mfu"]]
        counts = [row.get("kernels"), row.get("synchronisations"), row["peak_gib"]]
        table.append([row["model"], row["optimizer"], mode, r, *figures, *counts])
    yield from aligned(header, table)
    reasons = {row["method"] for row in rows if row["method"] not in (row["mode"], "graph")}
    yield from (f"  * {reason}" for reason in sorted(reasons))
    uncounted = {row["not_counted"] for row in rows if "not_counted" in row}
    yield from (f"  not counted: {reason}" for reason in sorted(uncounted))
    kept = max((row["held_before_gib"] or 0.0 for row in rows), default=0.0)
    if kept > LEFTOVER_GIB:
        yield f"  NOT ALONE: up to {kept:.1f} GiB were held when a model was built; peaks are too high by that"
    lost = [
        f"{row['model']}, {row['optimizer']}, r/k {text(row['r_over_k'])}" for row in rows if row["finite"] is False
    ]
    if lost:
        yield f"  NOT FINITE: {'; '.join(lost)}"


def _update(rows: Sequence[Row]) -> Iterator[str]:
    header = ["model", "SVDs by", "event", "r/k", "layers", "s", "waits", "waits a layer", "GiB", "dense GiB"]
    keys = (
        "event",
        "r_over_k",
        "layers",
        "seconds",
        "synchronisations",
        "synchronisations_per_layer",
        "peak_gib",
    )
    yield from aligned(
        header,
        ([row["model"], row.get("svd"), *(row[k] for k in keys), row.get("dense_gib")] for row in rows),
    )


def _svd(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each way: milliseconds a matrix at every size, and the worst of its errors."""
    ways = list(dict.fromkeys((row["way"], row["batch"]) for row in rows))
    sizes = sorted({row["n"] for row in rows})
    table = []
    for way, batch in ways:
        mine = {row["n"]: row for row in rows if (row["way"], row["batch"]) == (way, batch)}
        times = [mine[n]["ms_per_matrix"] if n in mine else None for n in sizes]
        worst = [f"{max(row[key] for row in mine.values()):.0e}" for key in ("residual", "orthogonality")]
        table.append([way, batch, *times, *worst])
    header = ["ms a matrix, n =", "at once", *map(str, sizes), "residual", "orthogonality"]
    yield from aligned(header, table)


def _accuracy(rows: Sequence[Row]) -> Iterator[str]:
    keys = ("epochs", "accuracy", "train_s", "trained_share", "peak_memory_gib")
    yield from aligned(["run", *keys], ([row["run"], *(row.get(key) for key in keys)] for row in rows))


def _pytest(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        cut = f", cut off {row['cut_off']}" if "cut_off" in row else ""
        yield f"  {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped{cut}"
        yield from (f"  FAILED {name}" for name in row["failures"][:20])


SHOWN: dict[str, Callable[[Sequence[Row]], Iterator[str]]] = {
    "card": _card,
    "layer": _layer,
    "step": _step,
    "update": _update,
    "svd": _svd,
    "accuracy": _accuracy,
    "pytest": _pytest,
}
