"""``oialr plan``."""

from __future__ import annotations

import argparse
import csv
import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from hpc_oialr.cli.console import add_command, add_force, add_recipe, console, show
from hpc_oialr.errors import ConfigError
from hpc_oialr.outputs import claim, marked, new_file

if TYPE_CHECKING:
    from hpc_oialr.plan.planner import Planner
    from hpc_oialr.train.config import RunConfig

EXAMPLES = """  oialr plan vit_b16 --nodes 1,2,4,8,16,32,64,128,256 --site horeka
  oialr plan vit_b16 --nodes 1,16,1024 --gpu a100-40 --gpus-per-node 4 --network hdr200 --weak --engines all
  oialr plan text_gpt --nodes 1 --gpus-per-node 2 --probe --calibration benchmarks/results/comm.json
  oialr plan vit_b16 --memory-gib 4 --out plan.csv
  oialr plan vit_b16 --dry-run 1024 --engine FSDP"""

# Columns of a step, and what its figures begin with.
STAGES = {"dense": "dense", "low-rank": "converted", "end": "end"}
_PLAN = marked("a plan", b'{\n "recipe": ', b"engine,nodes,processes,", mark=b"global_batch")


def add(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "predict memory, traffic and time of a recipe on any number of nodes"
    parser = add_command(commands, "plan", run, summary=summary, examples=EXAMPLES, takes_settings=True)
    add_recipe(parser)
    option = parser.add_argument
    option("--nodes", metavar="N,N,...", default="1", help="numbers of nodes; default 1")
    option("--gpus-per-node", metavar="N", type=int, help="or processes; default the site's, or 1")
    option("--engines", metavar="NAME,...|all", default="", help="default the recipe's (--engine)")
    option("--site", metavar="NAME", help="a cluster's GPUs and network, by name")
    option("--gpu", metavar="NAME", help="a100-40, a100-80, h100, mi250x; default this machine")
    option("--network", metavar="NAME", help="hdr200, ndr, slingshot11; default hdr200 with --gpu")
    option("--adapters", metavar="N", type=int, help="network adapters of a node; default 1")
    option("--memory-gib", metavar="X", type=float, help="of a process; default the GPU's")
    option("--weak", action="store_true", help="keep the batch of a process, not the global one")
    explained = "share of k that r falls to, under rules that depend on singular values"
    option("--r-fraction", metavar="F", type=float, default=0.25, help=explained)
    option("--samples", metavar="N", type=int, help="of the training data, if it is not here")
    option("--calibration", metavar="FILE", type=Path, help="result of python -m benchmarks.comm")
    option("--probe", action="store_true", help="measure some real steps on this machine first")
    explained = "instead: run the code as the first, middle and last of P processes"
    option("--dry-run", metavar="P", type=int, help=explained)
    option("--out", metavar="FILE", type=Path, help="write all figures, as JSON, or CSV for .csv")
    add_force(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the tables of a plan, or what a dry run did."""
    from hpc_oialr.train.load_config import load_config

    config = load_config(arguments.recipe, arguments.settings).config
    if arguments.dry_run is not None:
        return _dry_run(config, arguments)
    from hpc_oialr.plan.request import Request, prepare
    from hpc_oialr.plan.workload import label

    if arguments.out is not None:
        inputs = [arguments.recipe, *([arguments.calibration] if arguments.calibration else [])]
        claim(arguments.out, _PLAN, inputs=inputs, force=arguments.force)
    given = vars(arguments) | {
        "nodes": _numbers(arguments.nodes),
        "engines": [name for name in arguments.engines.split(",") if name],
    }
    request = Request(**{field.name: given[field.name] for field in fields(Request)})
    planner, engines = prepare(config, request)
    rows: list[dict[str, Any]] = []
    # Some engines take a minute; only terminals show it.
    with Console(stderr=True).status("") as status:
        for engine in engines:
            status.update(f"{label(engine)}: the run's code on tensors without data")
            rows += planner.rows(request.nodes, request.per_node, engine)
    _show(arguments.recipe, planner, rows)
    if arguments.out is not None:
        about = {"recipe": arguments.recipe, "memory_gib": planner.memory_gib, "grounds": planner.grounds()}
        write(rows, about, arguments.out, force=arguments.force)
        show(arguments.out)
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError("--nodes", text, "must be whole numbers with commas between, e.g. 1,2,4") from None


def write(
    rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any], path: Path, *, force: bool = False
) -> None:
    """JSON with what the plan was made of, or the rows alone as CSV, by the file's ending."""
    from hpc_oialr.record.files import to_json

    target = claim(path, _PLAN, force=force)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    if path.suffix == ".csv":
        table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
        table.writeheader()
        table.writerows(rows)
    else:
        text.write(to_json({**about, "rows": list(rows)}, indent=1) + "\n")
    with new_file(target) as draft:
        draft.write_text(text.getvalue(), encoding="utf-8")


# -- tables --------------------------------------------------------------------------------------------


def _show(recipe: str, planner: Planner, rows: Sequence[Mapping[str, Any]]) -> None:
    show(
        f"{recipe}: {planner.workload.samples:,} training samples, {len(planner.shapes)} layers become low-rank"
    )
    possible = [row for row in rows if "dense_s" in row]
    for table in (_memory_table(rows, planner.memory_gib), _step_table(possible), _run_table(possible)):
        console().print(table)
    for row in rows:
        if row["advice"]:
            show(f"{row['engine']}, {row['nodes']:,} nodes: {row['advice']}")
    for line in planner.grounds():
        show(line)


def _memory_table(rows: Sequence[Mapping[str, Any]], memory_gib: float) -> Table:
    """Highest memory of a process in each part of a run."""
    parts = {"dense": "dense", "convert": "conversion", "low-rank": "converted", "end": "end"}
    names = ["procs", "batch", *parts, "peak"]
    table = _table(f"memory of a process (GiB), of {memory_gib:.1f}", Column("engine"), "nodes", *names)
    table.add_column("fits")
    for row in rows:
        cells = [_number(row.get(f"{name}_peak_gib"), 2) for name in parts.values()]
        peak = _number(row.get("peak_gib"), 2)
        verdict = "yes" if row["fits"] else "no" if peak else "-"
        where = (f"{row[name]:,}" for name in ("nodes", "processes", "batch"))
        table.add_row(row["engine"], *where, *cells, peak, verdict)
    return table


def _step_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Time and messages of a step."""
    basis = rows[0]["time_from"] if rows else "nothing"
    title = f"a step: time (ms) from {basis}, and what a process sends (MB)"
    table = _table(title, Column("engine"), "nodes", *STAGES, *(f"MB {name}" for name in STAGES))
    for row in rows:
        times = [_number(row.get(f"{stage}_step_s"), 1, factor=1e3) for stage in STAGES.values()]
        sent = [_number(row.get(f"{stage}_sent_mb"), 1) for stage in STAGES.values()]
        table.add_row(row["engine"], f"{row['nodes']:,}", *times, *sent)
    return table


def _run_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Time of a run, dense and with the method."""
    names = ("steps", "GFLOP dense", "GFLOP end", "dense", "OIALR", "updates", "ratio")
    title = "a run: work of a process in a step, and estimated time to the end"
    table = _table(title, Column("engine"), "nodes", *names)
    for row in rows:
        cells = [f"{row['steps']:,}", _number(row["dense_gflop"], 0), _number(row.get("end_gflop"), 0)]
        cells.append(_duration(row["dense_s"]))
        if "end_step_s" in row:
            ratio = _number(row["oialr_s"] / row["dense_s"], 2)
            cells += [_duration(row["oialr_s"]), _duration(row["events_s"]), ratio]
        table.add_row(row["engine"], f"{row['nodes']:,}", *cells)
    return table


def _table(title: str, *columns: Column | str) -> Table:
    """A table without rows; columns given by name are numbers."""
    named = [Column(c, justify="right") if isinstance(c, str) else c for c in columns]
    return Table(*named, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _number(value: float | None, digits: int, *, factor: float = 1.0) -> str:
    return "" if value is None else f"{value * factor:,.{digits}f}"


def _duration(seconds: float) -> str:
    """Three figures in the largest unit that fits.

    Examples
    --------
    >>> [_duration(s) for s in (12.34, 754.0, 86_400.0)]
    ['12.3 s', '12.6 min', '24.0 h']
    """
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _dry_run(config: RunConfig, arguments: argparse.Namespace) -> int:
    from hpc_oialr.plan.schedule import predictable_rule
    from hpc_oialr.plan.scripted_run import dry_run
    from hpc_oialr.plan.workload import Workload, label

    if arguments.dry_run < 2:
        raise ConfigError("--dry-run", arguments.dry_run, "must be at least 2 processes")
    start = time.perf_counter()
    rule = predictable_rule(config.oialr.rule, arguments.r_fraction)[0] if config.oialr else None
    title = f"{arguments.recipe} under {label(config.engine)} as one of {arguments.dry_run:,} processes"
    table = _table(title, "rank", "time (s)", "SVDs done", "r", "holds (MiB)", "metrics over")
    for done in dry_run(Workload.of(config, arguments.samples), arguments.dry_run, rule=rule):
        span, held = f"{done.r[0]} to {done.r[1]}", f"{done.resident_bytes / 1024**2:,.1f}"
        table.add_row(f"{done.rank:,}", f"{done.seconds:.1f}", str(done.svds), span, held, done.channel)
    console().print(table)
    show(f"session, conversion, update and three steps of each, in {time.perf_counter() - start:.1f} s")
    return 0
