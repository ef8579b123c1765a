"""``oialr plan``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from hpc_oialr.cli.console import add_command, add_force, console, show_warnings
from hpc_oialr.errors import ConfigError

if TYPE_CHECKING:
    from hpc_oialr.plan.planner import Planner
    from hpc_oialr.train.config import RunConfig

EXAMPLES = """  oialr plan vit_b16 --nodes 1,2,4,8,16,32,64,128,256 --site horeka
  oialr plan vit_b16 --nodes 1,16,1024 --gpu a100-40 --gpus-per-node 4 --network hdr200 --weak --engines all
  oialr plan text_gpt --nodes 1 --gpus-per-node 2 --probe --calibration benchmarks/results/comm.json
  oialr plan vit_b16 --memory-gib 4 --out plan.csv
  oialr plan vit_b16 --dry-run 1024 --engine FSDP"""

GIB = 1024**3


def add(commands: Any) -> None:
    """Add the command to the parser."""
    summary = "predict memory, traffic and time of a recipe on any number of nodes"
    parser = add_command(commands, "plan", summary=summary, examples=EXAMPLES, takes_settings=True)
    parser.add_argument(
        "recipe", metavar="RECIPE|FILE", help="name of a recipe (see oialr recipes), or a YAML file"
    )
    parser.add_argument("--nodes", metavar="N,N,...", default="1", help="numbers of nodes; default 1")
    parser.add_argument(
        "--gpus-per-node", metavar="N", type=int, help="or processes; default the site's, or 1"
    )
    parser.add_argument(
        "--engines", metavar="NAME,...|all", default="", help="default the recipe's (--engine)"
    )
    parser.add_argument("--site", metavar="NAME", help="a cluster's GPUs and network, by name")
    parser.add_argument("--gpu", metavar="NAME", help="a100-40, a100-80, h100, mi250x; default this machine")
    parser.add_argument(
        "--network", metavar="NAME", help="hdr200, ndr, slingshot11; default hdr200 with --gpu"
    )
    parser.add_argument("--adapters", metavar="N", type=int, help="network adapters of a node; default 1")
    parser.add_argument("--memory-gib", metavar="X", type=float, help="of a process; default the GPU's")
    parser.add_argument("--weak", action="store_true", help="keep the batch of a process, not the global one")
    parser.add_argument("--r-fraction", metavar="F", type=float, default=0.25,
                        help="share of k that r falls to, under rules that depend on singular values")  # fmt: skip
    parser.add_argument("--samples", metavar="N", type=int, help="of the training data, if it is not here")
    parser.add_argument(
        "--calibration", metavar="FILE", type=Path, help="result of python -m benchmarks.comm"
    )
    parser.add_argument("--probe", action="store_true", help="measure some real steps on this machine first")
    parser.add_argument("--dry-run", metavar="P", type=int,
                        help="instead: run the code as the first, middle and last of P processes")  # fmt: skip
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="write all figures, as JSON, or CSV for .csv"
    )
    add_force(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the tables of a plan, or what a dry run did."""
    from hpc_oialr.train.load_config import load_config

    show_warnings()
    config = load_config(arguments.recipe, arguments.settings).config
    if arguments.dry_run is not None:
        return _dry_run(config, arguments)
    from hpc_oialr.plan.deployment import label
    from hpc_oialr.plan.request import Request, prepare
    from hpc_oialr.plan.rows import claim_plan, write

    if arguments.out is not None:
        inputs = [arguments.recipe, *([arguments.calibration] if arguments.calibration else [])]
        claim_plan(arguments.out, inputs, force=arguments.force)
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
        about = {
            "recipe": arguments.recipe,
            "memory_gib": planner.memory_gib,
            "grounds": planner.grounds(),
        }
        write(rows, about, arguments.out, force=arguments.force)
        console().print(str(arguments.out), markup=False)
    return 0


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError("--nodes", text, "must be whole numbers with commas between, e.g. 1,2,4") from None


# -- what is shown -------------------------------------------------------------------------------------


def _show(recipe: str, planner: Planner, rows: Sequence[Mapping[str, Any]]) -> None:
    out, shapes, samples = console(), planner.shapes, planner.workload.samples
    out.print(f"{recipe}: {samples:,} training samples, {len(shapes)} layers become low-rank", markup=False)
    possible = [row for row in rows if "dense_s" in row]
    out.print(memory_table(rows, planner.memory_gib))
    out.print(step_table(possible))
    out.print(run_table(possible))
    for row in rows:
        if row["advice"]:
            out.print(f"{row['engine']}, {row['nodes']:,} nodes: {row['advice']}", markup=False)
    for line in planner.grounds():
        out.print(line, markup=False)


def memory_table(rows: Sequence[Mapping[str, Any]], memory_gib: float) -> Table:
    """Highest memory of a process in each part of a run."""
    parts = {"dense": "dense", "convert": "conversion", "low-rank": "converted", "end": "end"}
    table = _table(f"memory of a process (GiB), of {memory_gib:.1f}", "procs", "batch", *parts, "peak")
    table.add_column("fits")
    for found in rows:
        cells = [_number(found.get(f"{name}_peak_gib"), 2) for name in parts.values()]
        peak = _number(found.get("peak_gib"), 2)
        verdict = "yes" if found["fits"] else "no" if peak else "-"
        where = f"{found['processes']:,}", f"{found['batch']:,}"
        table.add_row(*_where(found), *where, *cells, peak, verdict)
    return table


STAGES = {"dense": "dense", "low-rank": "converted", "end": "end"}


def step_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Time and messages of a step."""
    basis = rows[0]["time_from"] if rows else "nothing"
    title = f"a step: time (ms) from {basis}, and what a process sends (MB)"
    table = _table(title, *STAGES, *(f"MB {name}" for name in STAGES))
    for found in rows:
        times = [_number(_times(found.get(f"{stage}_step_s"), 1e3), 1) for stage in STAGES.values()]
        sent = [_number(found.get(f"{stage}_sent_mb"), 1) for stage in STAGES.values()]
        table.add_row(*_where(found), *times, *sent)
    return table


def run_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Time of a run, dense and with the method."""
    names = ("steps", "GFLOP dense", "GFLOP end", "dense", "OIALR", "updates", "ratio")
    table = _table("a run: work of a process in a step, and estimated time to the end", *names)
    for found in rows:
        cells = [f"{found['steps']:,}", _number(found["dense_gflop"], 0), _number(found.get("end_gflop"), 0)]
        cells.append(_duration(found["dense_s"]))
        if "end_step_s" in found:
            ratio = _number(found["oialr_s"] / found["dense_s"], 2)
            cells += [_duration(found["oialr_s"]), _duration(found["events_s"]), ratio]
        table.add_row(*_where(found), *cells)
    return table


def _table(title: str, *names: str) -> Table:
    return _figures(title, Column("engine"), "nodes", *names)


def _figures(title: str, *columns: Column | str) -> Table:
    """A table without rows; columns by name are of figures."""
    named = [Column(c, justify="right") if isinstance(c, str) else c for c in columns]
    return Table(*named, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _where(found: Mapping[str, Any]) -> tuple[str, str]:
    return found["engine"], f"{found['nodes']:,}"


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


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
    from hpc_oialr.plan.deployment import label
    from hpc_oialr.plan.dry_run import dry_run
    from hpc_oialr.plan.schedule import predictable_rule
    from hpc_oialr.plan.workload import Workload

    if arguments.dry_run < 2:
        raise ConfigError("--dry-run", arguments.dry_run, "must be at least 2 processes")
    start, out = time.perf_counter(), console()
    rule = predictable_rule(config.oialr.rule, arguments.r_fraction)[0] if config.oialr else None
    title = f"{arguments.recipe} under {label(config.engine)} as one of {arguments.dry_run:,} processes"
    table = _figures(title, "rank", "time (s)", "SVDs done", "r", "holds (MiB)", "metrics over")
    for done in dry_run(Workload.of(config, arguments.samples), arguments.dry_run, rule=rule):
        span = f"{done.r[0]} to {done.r[1]}"
        held = f"{done.resident_bytes / 1024**2:,.1f}"
        table.add_row(f"{done.rank:,}", f"{done.seconds:.1f}", str(done.svds), span, held, done.channel)
    out.print(table)
    out.print(
        f"session, conversion, update and three steps of each, in {time.perf_counter() - start:.1f} s",
        markup=False,
    )
    return 0
