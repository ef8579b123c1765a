"""Times: layers, steps and models on CPUs and a GPU, reading of images, recording."""

from __future__ import annotations

import textwrap
from typing import Any

from benchmarks.pages.tables import load, origin, origins, table


def layer() -> str:
    """Layer speed, fp32 and bf16."""
    result, other = load("layer"), load("layer_avx2")
    rows = [
        (
            f"{row['m']} x {row['n']}",
            row["dtype"],
            f"{row['r'] / min(row['m'], row['n']):g} k",
            f"{row['flop_ratio']:.2f}",
            f"{row['time_ratio']:.2f}",
            f"{row['rebuild_ratio']:.2f}",
        )
        for row in result["rows"]
        if row["r"] / min(row["m"], row["n"]) <= 0.5
    ]
    header = ("layer", "dtype", "r", "operations", "time, factored", "time, rebuilding W")
    tuned = [row["dense_onednn_ratio"] for row in result["rows"] if row["dtype"] == "float32"]
    remark = (
        "Dense is PyTorch's `nn.Linear`. In float32 the factored products use oneDNN (on CPUs with AVX-512); a dense "
        f"layer through oneDNN would take {min(tuned):.2f} to {max(tuned):.2f} of its time. {_without_avx512(other)}"
    )
    text = f"{table(header, rows)}\n\n{textwrap.fill(remark, 118)}\n"
    return text + origins({"layer": result, "layer_avx2": other})


def _without_avx512(result: dict[str, Any]) -> str:
    """Time over operations, and that of the products alone, on another CPU."""
    small = [row for row in result["rows"] if 8 * row["r"] <= min(row["m"], row["n"])]
    over = [row["time_ratio"] / row["flop_ratio"] for row in result["rows"] if row not in small]
    thin, bare = ([row[name] / row["flop_ratio"] for row in small] for name in ("time_ratio", "products_ratio"))
    return (
        "On a CPU without it, with one thread, a layer takes "
        f"{min(over):.2f} to {max(over):.2f} times the share that the operations promise down to k/4, and "
        f"{min(thin):.2f} to {max(thin):.2f} at k/8, where the matrix products alone, so thin, take {min(bare):.2f} to "
        f"{max(bare):.2f}."
    )


def step() -> str:
    """Step speed of ViT-B/16."""
    result = load("step")
    rows = [
        (
            row["dtype"],
            f"{row['r_fraction']:g} k",
            f"{row['time_ratio']:.2f}",
            f"{row['peak_memory_ratio']:.2f}",
            f"{row['trainable_share']:.1%}",
        )
        for row in result["rows"]
    ]
    header = ("dtype", "r", "step time / dense", "peak memory / dense", "trained")
    return table(header, rows) + "\n" + origin("step", result["environment"])


def serve() -> str:
    """Factored inference: time and size over dense."""
    result = load("serve")
    rows = [
        (
            row["model"],
            f"{row['r_fraction']:g} k",
            str(row["batch"]),
            "{:.2f} [{:.2f} to {:.2f}]".format(row["time_ratio"], *row["spread"]),
            f"{row['size_ratio']:.2f}",
        )
        for row in result["rows"]
        if row["form"] == "factored"
    ]
    header = ("model", "r", "batch", "time / dense [10 % to 90 % of the rounds]", "size / dense")
    unfolded = [row["time_ratio"] for row in result["rows"] if row["form"] == "as trained"]
    remark = f"As trained, with the core as a third factor, it would be {min(unfolded):.2f} to {max(unfolded):.2f}."
    return f"{table(header, rows)}\n\n{remark}\n{origin('serve', result['environment'])}"


def gpu() -> str:
    """Layers, steps and updates on one GPU."""
    from benchmarks.gpu.measured import summary

    return summary()


def image_shards() -> str:
    """Random reads of images from tar shards and HDF5."""
    result = load("image_shards")
    rows = []
    for row in result["rows"]:
        side = row["decoded_side"]
        name = f"{row['images']}, {row['mean_bytes'] / 1024:.1f} KiB, decoded to {side} x {side}"
        for way in ("tar", "HDF5"):
            rates = [f"{row[f'{way}, {what} (1/s)']:,.0f}" for what in ("read", "read and decode")]
            rows.append((name, way, *rates, f"{row[f'{way}, read and decode / decode']:.2f}", ""))
        rows[-2] = (*rows[-2][:-1], f"{row['reader, whole batches / decode']:.2f}")
    header = (
        "images",
        "format",
        "read, 1/s",
        "read and decode, 1/s",
        "over decoding alone",
        "reader over decoding alone",
    )
    return table(header, rows) + "\n" + origin("image_shards", result["environment"])


def record() -> str:
    """What recording costs, and how long a large report takes to open."""
    writing, page = load("record"), load("report")
    row, report = writing["rows"][0], page["rows"][0]
    text = (
        f"Recording costs {row['overhead']:.2%} (95 % interval: {row['overhead_low']:.2%} to "
        f"{row['overhead_high']:.2%}) of a step of `{row['recipe']}` with an event every {row['steps_a_block']} steps, "
        f"and {row['overhead_if_nothing_overlapped']:.2%} if nothing overlapped with "
        f"the training. The report of a run of {report['layers']} layers and {report['updates']} updates is "
        f"{report['page_mib']:.0f} MiB large and is drawn after {report['load_median_s']:.1f} s."
    )
    return textwrap.fill(text, 118) + "\n" + origins({"record": writing, "report": page})
