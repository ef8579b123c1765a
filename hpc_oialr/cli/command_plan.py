"""Predict memory, traffic and time of a recipe on any number of nodes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hpc_oialr.cli.console import add_out, add_recipe, console, new_table, show
from hpc_oialr.errors import ConfigError, UnknownNameError, check_interval
from hpc_oialr.outputs import claim, marked, new_file
from hpc_oialr.record.progress import clock_time

if TYPE_CHECKING:
    from hpc_oialr.engines import EngineConfig
    from hpc_oialr.plan.planner import Planner
    from hpc_oialr.train.config import RunConfig

EXAMPLES = """  oialr plan vit_b16 --nodes 1,2,4,8,16,32,64,128,256 --site horeka
  oialr plan vit_b16 --nodes 1,16,1024 --gpu a100-40 --gpus-per-node 4 --weak --engines all
  oialr plan text_gpt --nodes 1 --gpus-per-node 2 --probe --calibration benchmarks/results/comm.json
  oialr plan vit_b16 --memory-gib 4 --out plan.json
  oialr plan vit_b16 --dry-run 1024 --engine FSDP"""

_PLAN = marked("a plan", b'{\n "recipe": ', mark=b"global_batch")


def add(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    option = parser.add_argument
    option("--nodes", metavar="N,N,...", default="1", help="numbers of nodes; default 1")
    option("--gpus-per-node", metavar="N", type=int, help="or processes; default the site's, or 1")
    option("--engines", metavar="NAME,...|all", default="", help="default the recipe's (--engine)")
    option("--site", metavar="NAME", help="horeka, juwels_booster, lumi or perlmutter: its GPUs and network")
    option(
        "--gpu",
        metavar="NAME",
        help="a100-40, a100-80, h100 or mi250x, over HDR200; default the site's, or this machine",
    )
    option("--memory-gib", metavar="X", type=float, help="of a process; default the GPU's")
    option("--weak", action="store_true", help="keep the batch of a process, not the global one")
    option("--r-fraction", metavar="F", type=float, default=0.25, help="of k, to which r is taken to fall")
    option("--samples", metavar="N", type=int, help="of the training data, if it is not here")
    option("--calibration", metavar="FILE", type=Path, help="result of python -m benchmarks.comm")
    option("--probe", action="store_true", help="measure some real steps on this machine first")
    option("--dry-run", metavar="P", type=int, help="run the code as the first, middle and last of P")
    option("--paper", action="store_true", help="plan the published method, with the recipe's paper settings")
    add_out(parser, "FILE", "write all figures as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the tables of a plan, or what a dry run did."""
    from hpc_oialr.plan.workload import label
    from hpc_oialr.record.files import to_json
    from hpc_oialr.train.load_config import load_config, paper_variant

    loaded = load_config(arguments.recipe, arguments.settings)
    config = (paper_variant(loaded) if arguments.paper else loaded).config
    if arguments.dry_run is not None:
        return _dry_run(config, arguments)
    target = None
    if arguments.out is not None:
        inputs = [each for each in (arguments.recipe, arguments.calibration) if each]
        target = claim(arguments.out, _PLAN, inputs=inputs, force=arguments.force)
    planner, nodes, per_node, engines = _prepare(config, arguments)
    rows: list[dict[str, Any]] = []
    # Some engines take a minute; only terminals show it.
    with Console(stderr=True).status("") as status:
        for engine in engines:
            status.update(f"{label(engine)}: the run's code on tensors without data")
            rows += planner.rows(nodes, per_node, engine)
    _show(arguments.recipe, planner, rows)
    if target is not None:
        about = {"recipe": arguments.recipe, "memory_gib": planner.memory_gib, "grounds": planner.grounds()}
        target.parent.mkdir(parents=True, exist_ok=True)
        with new_file(target) as draft:
            draft.write_text(to_json({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        show(arguments.out)
    return 0


def _prepare(config: RunConfig, options: argparse.Namespace) -> tuple[Planner, list[int], int, list[EngineConfig]]:
    """The planner, with steps measured if requested; numbers of nodes, processes of each node, engines."""
    from hpc_oialr.plan.machine import ClusterPreset, cluster, gpu_machine, this_machine
    from hpc_oialr.plan.planner import Planner
    from hpc_oialr.plan.scripted_run import probe
    from hpc_oialr.plan.workload import Workload, all_engines

    try:
        nodes = [int(word) for word in options.nodes.split(",")]
    except ValueError:
        rule = "must be whole numbers with commas between, e.g. 1,2,4"
        raise ConfigError("--nodes", options.nodes, rule) from None
    site = cluster(options.site) if options.site else ClusterPreset("", "hdr200", 1, 1)
    site = site._replace(gpu=options.gpu or site.gpu)
    per_node = site.gpus_per_node if options.gpus_per_node is None else options.gpus_per_node
    _check(options, nodes, per_node)
    workload = Workload.of(config, options.samples)
    machine = gpu_machine(site) if site.gpu else this_machine(options.calibration)
    chosen, known = options.engines.split(","), all_engines(per_node)
    valid = {type(engine).__name__ for engine in known}
    if unknown := [name for name in chosen if name not in (*valid, "all", "")]:
        raise UnknownNameError("engine", unknown[0], [*valid, "all"])
    engines = [engine for engine in known if "all" in chosen or type(engine).__name__ in chosen]
    engines = engines or [config.engine]
    memory_gib = options.memory_gib or machine.memory_of_process_gib(per_node)
    planner = Planner(workload, machine, memory_gib, r_fraction=options.r_fraction, weak=options.weak)
    if options.probe:
        batches = {planner.deployment(n, per_node, engine).batch for n in nodes for engine in engines}
        planner.use(probe(workload, planner.rule, batches, machine.threads(per_node)))
    return planner, nodes, per_node, engines


def _check(options: argparse.Namespace, nodes: Sequence[int], per_node: int) -> None:
    for name, values in (("--nodes", nodes), ("--gpus-per-node", [per_node])):
        if min(values) < 1:
            raise ConfigError(name, values, "must be at least 1")
    check_interval("--r-fraction", options.r_fraction, 0, 1, closed=(False, True))
    if options.memory_gib is not None:
        check_interval("--memory-gib", options.memory_gib, 0, float("inf"))
    other = options.site or options.gpu
    for name, value in (("--probe", options.probe), ("--calibration", str(options.calibration or ""))):
        if value and other:
            rule = f"is of the machine at hand, and the plan is for {other}"
            raise ConfigError(name, value, rule, fix=f"Leave out --site and --gpu, or {name}.")


_STAGES = ("dense", "dense"), ("low-rank", "converted"), ("end", "end")
# Heading, key of a row and format of its value; no value, no text.
_Columns = Sequence[tuple[str, str, str]]
_MEMORY: _Columns = [
    ("procs", "processes", ",d"),
    ("batch", "batch", ",d"),
    ("dense", "dense_peak_gib", ",.2f"),
    ("convert", "conversion_peak_gib", ",.2f"),
    ("low-rank", "converted_peak_gib", ",.2f"),
    ("end", "end_peak_gib", ",.2f"),
    ("peak", "peak_gib", ",.2f"),
    ("fits", "verdict", ""),
]
_STEP: _Columns = [
    *((heading, f"{stage}_step_ms", ",.1f") for heading, stage in _STAGES),
    *((f"MB {heading}", f"{stage}_sent_mb", ",.1f") for heading, stage in _STAGES),
]
_RUN: _Columns = [
    ("steps", "steps", ",d"),
    ("GFLOP dense", "dense_gflop", ",.0f"),
    ("GFLOP end", "end_gflop", ",.0f"),
    ("dense", "dense_time", ""),
    ("OIALR", "oialr_time", ""),
    ("updates", "events_time", ""),
    ("ratio", "ratio", ",.2f"),
]


def _show(recipe: str, planner: Planner, rows: Sequence[Mapping[str, Any]]) -> None:
    samples, layers = planner.workload.samples, len(planner.shapes)
    show(f"{recipe}: {samples:,} training samples, {layers} layers become low-rank")
    verdicts = ["yes" if row["fits"] else "no" if "peak_gib" in row else "-" for row in rows]
    judged = [{**row, "verdict": verdict} for row, verdict in zip(rows, verdicts, strict=True)]
    _print_table(f"memory of a process (GiB), of {planner.memory_gib:.1f}", judged, _MEMORY)
    timed = []
    for row in (row for row in rows if "dense_s" in row):
        of_run = {f"{name}_time": clock_time(row[f"{name}_s"]) for name in ("dense", "oialr", "events")}
        of_step = {f"{stage}_step_ms": 1e3 * row[f"{stage}_step_s"] for stage in planner.stages}
        timed.append({**row, **of_run, **of_step, "ratio": row["oialr_s"] / row["dense_s"]})
    basis = timed[0]["time_from"] if timed else "nothing"
    _print_table(f"a step: time (ms) from {basis}, and what a process sends (MB)", timed, _STEP)
    title = "a run: work of a process in a step, and estimated time to the end"
    _print_table(title, timed, _RUN if layers else _RUN[:4])
    for row in rows:
        if row["advice"]:
            show(f"{row['engine']}, {row['nodes']:,} nodes: {row['advice']}")
    for line in planner.grounds():
        show(line)


def _print_table(title: str, rows: Sequence[Mapping[str, Any]], columns: _Columns) -> None:
    columns = [("nodes", "nodes", ",d"), *columns]
    table = new_table(title, "engine", *(heading for heading, _, _ in columns))
    for row in rows:
        cells = (format(row[key], form) if key in row else "" for _, key, form in columns)
        table.add_row(row["engine"], *cells)
    console().print(table)


def _dry_run(config: RunConfig, arguments: argparse.Namespace) -> int:
    from hpc_oialr.plan.schedule import predictable_rule
    from hpc_oialr.plan.scripted_run import dry_run
    from hpc_oialr.plan.workload import Workload, label

    if arguments.dry_run < 2:
        raise ConfigError("--dry-run", arguments.dry_run, "must be at least 2 processes")
    start = time.perf_counter()
    rule = predictable_rule(config.oialr.rule, arguments.r_fraction)[0] if config.oialr else None
    title = f"{arguments.recipe} under {label(config.engine)} as one of {arguments.dry_run:,} processes"
    table = new_table(title, "rank", "time (s)", "SVDs done", "r", "holds (MiB)", "metrics over")
    for done in dry_run(Workload.of(config, arguments.samples), arguments.dry_run, rule=rule):
        span, held = f"{done.r[0]} to {done.r[1]}", f"{done.resident_bytes / 1024**2:,.1f}"
        table.add_row(f"{done.rank:,}", f"{done.seconds:.1f}", str(done.svds), span, held, done.channel)
    console().print(table)
    show(f"set-up, conversion, update and three steps of each rank, in {time.perf_counter() - start:.1f} s")
    return 0
