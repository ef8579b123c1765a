"""Evaluate trained models: metrics, size, memory, latency, throughput."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from hpc_oialr.cli.console import add_out, console, new_table, show, writing

EXAMPLES = """  oialr eval runs/first
  oialr eval runs/demo --batches 1 8 64                   (dense, merged and factored, of oialr compare)
  oialr eval runs/first/checkpoints/step_00000500 --data FOLDER --out evaluation.json

A low-rank model is measured in two forms: merged, an ordinary dense model, and factored, two thin layers in place of
each low-rank one. Settings of the data and of the passes may follow, e.g. --train.precision bf16."""


def add(parser: argparse.ArgumentParser) -> None:
    explained = "folder of a run, of a checkpoint (RUN/checkpoints/step_...), or of oialr compare"
    parser.add_argument("runs", metavar="RUN|CHECKPOINT", type=Path, nargs="+", help=explained)
    option = parser.add_argument
    option("--data", metavar="PATH", help="other data of the same kind; default those of the run (--data.path)")
    option("--split", choices=("test", "validation"), help="default test, where there is one")
    option("--step", type=int, metavar="N", help="checkpoint to take; default the last")
    option(
        "--batches", type=int, nargs="+", metavar="N", default=[1, 32], help="sizes of timed batches (default: 1 32)"
    )
    option("--repeats", type=int, default=20, metavar="N", help="timed passes of each model and size (default: 20)")
    option("--device", metavar="NAME", help="cpu or cuda; default that of the run's settings")
    option("--json", action="store_true", help="print JSON")
    add_out(parser, "FILE", "write it as JSON, too")


def run(arguments: argparse.Namespace) -> None:
    from hpc_oialr.outputs import claim, marked, new_file
    from hpc_oialr.record.files import to_json
    from hpc_oialr.serve.evaluate import evaluate_runs

    out = arguments.out
    if out is not None:
        kind = marked("an evaluation", b'{\n "evaluation": ', mark=b'"environment": ')
        out = claim(out, kind, inputs=arguments.runs, force=arguments.force)
    data = [] if arguments.data is None else ["--data.path", arguments.data]
    options = {name: getattr(arguments, name) for name in ("step", "split", "batches", "repeats", "device")}
    found = evaluate_runs(arguments.runs, settings=[*data, *arguments.settings], **options)
    text = to_json({"evaluation": 1, **found}, indent=1) + "\n"
    if out is not None:
        with writing(out), new_file(out) as draft:
            draft.write_text(text, encoding="utf-8")
    if arguments.json:
        show(text, end="")
        return
    console().print(_table(found))
    if out is not None:
        show(arguments.out)


def _table(found: dict[str, Any]) -> Table:
    """One column a model."""
    models = found["models"]
    several = len({(row["run"], row["step"]) for row in models}) > 1
    names = [f"{Path(row['run']).name}, {row['form']}" if several else row["form"] for row in models]
    title = (
        f"{found['samples']:,} samples of {found['data']} ({found['split']}), {found['precision']}, {found['device']}"
    )
    table = new_table(title, "", *names)
    for name in models[0]["metrics"]:
        form = "{:.2%}" if name.endswith("accuracy") else "{:.4f}"
        table.add_row(name.replace("_", " "), *(form.format(row["metrics"][name]) for row in models))
    table.add_row("parameters", *(f"{row['parameters']:,}" for row in models))
    table.add_row("size on disk (MiB)", *(f"{row['file_bytes'] / 2**20:.2f}" for row in models))
    peak = f"peak memory, batch {models[0]['peak_memory_batch']} (MiB)"
    table.add_row(peak, *(f"{row['peak_memory_bytes'] / 2**20:.1f}" for row in models))
    for i, speed in enumerate(models[0]["speed"]):
        own = [row["speed"][i] for row in models]
        times = (f"{s['median_ms']:.2f} [{s['p10_ms']:.2f} to {s['p90_ms']:.2f}]" for s in own)
        table.add_row(f"latency, batch {speed['batch']} (ms)", *times)
        table.add_row(f"  time / {names[0]}", *(f"{s['time_ratio']:.3f}" for s in own))
        table.add_row(f"  {found['unit']} per s", *(f"{s['units_per_s']:,.0f}" for s in own))
    return table
