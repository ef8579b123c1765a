"""How dense training and OIALR scale: runs of one recipe on several numbers of nodes, submitted from here by submitit.

    python -m benchmarks.scaling --nodes 1,2,4,8 --gpus-per-node 4 --site horeka --out scaling.json   # on a login node
    python -m benchmarks.scaling --nodes 1,2,4 --local-slurm --out scaling.json      # four nodes made on this machine
    python -m benchmarks.scaling --nodes 1,2 --executor local --out scaling.json     # processes, without Slurm

Strong: the recipe's batch, shared by all processes. Weak: this batch on the smallest number of nodes, growing with their
number. `step_s` is the median step of the last phase (low-rank at its final r; dense), without evaluations and updates;
`efficiency` is relative to the smallest number of nodes. `sent_mb` is what a process hands to collectives in a step,
counted by `oialr plan`; `update_share` the time of SVDs and updates over the whole run's. Rows that are in the file are
not run again; `--spectra FOLDER` keeps every run's spectra.h5.

A step of P processes on C cores or GPUs is then fitted, for both sides at once, by least squares of relative errors, as

    samples per process * (seconds a sample, dense or low-rank) * max(1, P / C)
      + 2 ceil(log2 P) * latency + 2 (P - 1) / P * bytes / bandwidth,

with recursive halving and doubling as the cost of an all-reduce (Thakur, Rabenseifner and Gropp, 2005). `extrapolated`
is the formula's weak scaling on up to 4,096 processes that share nothing but the network, under the assumption that
latency and bandwidth stay what they were and that nothing overlaps. Each engine has its own: they are those of all its
messages taken for all-reduces. `planned` is what `oialr plan` says of the recipe `--plan` on the GPUs and the network
of a site, with its grounds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Row, arguments, earlier, finish
from benchmarks.slurm_cluster import Cluster, why_not
from hpc_oialr.distributed.environment import usable_cores
from hpc_oialr.launch import submit
from hpc_oialr.plan.machine import cluster, gpu_machine
from hpc_oialr.plan.planner import Planner
from hpc_oialr.plan.workload import Workload
from hpc_oialr.record import read_metrics
from hpc_oialr.train.load_config import load_config

SIDES = {"dense": ["--oialr", "null"], "OIALR": []}
# DeepSpeed's flat partitions cannot be stepped by Muon: both of its sides have AdamW, on one process too.
OPTIMIZERS = {"DeepSpeed": ["--optimizer", "AdamW", "--optimizer.lr", "1e-3"]}
KEY = ("recipe", "engine", "scaling", "side", "nodes")
SKIPPED = 3  # first steps of a phase: allocations, new buckets
MOST = 4096


def main() -> None:
    """Run what is not in the file yet, fit, extrapolate."""
    options = _options()
    rows = earlier(options.out)
    known = {tuple(row[name] for name in KEY) for row in rows}
    with ExitStack() as stack:
        if options.local_slurm:
            if (reason := why_not()) is not None:
                sys.exit(reason)
            os.environ.update(stack.enter_context(Cluster()).environment)
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.work)))
        for key in _keys(options):
            if tuple(key.values()) not in known:
                rows.append(_run(key, options, work))
                finish(rows, options.out)
    cores = usable_cores() if options.local_slurm or options.executor == "local" else None
    _add_efficiency(rows)
    fits = {engine: fit([row for row in rows if row["engine"] == engine], cores) for engine in options.engines}
    planned = [] if options.plan is None else _planned(options)
    finish(
        rows, options.out, cores=cores, fits=fits, planned=planned,
        extrapolated={engine: extrapolate(found, rows, engine) for engine, found in fits.items()},
    )  # fmt: skip


def _options() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--nodes", type=_numbers, default=[1, 2, 4], metavar="N,N,...")
    parser.add_argument("--recipe", default="text_gpt")
    parser.add_argument("--engines", nargs="+", default=["DDP"], metavar="NAME")
    parser.add_argument("--scalings", nargs="+", choices=("strong", "weak"), default=["strong", "weak"])
    parser.add_argument("--steps", type=int, default=40, help="of each run; default: %(default)s")
    parser.add_argument("--settings", nargs="*", default=[], metavar="SETTING", help="name=value, for every run")
    parser.add_argument("--executor", choices=("slurm", "local"), default="slurm")
    parser.add_argument(
        "--local-slurm", action="store_true", help="start a Slurm of four nodes on this machine, as root"
    )
    for name in ("site", "partition", "account"):
        parser.add_argument(f"--{name}", help="as of oialr submit")
    parser.add_argument("--time", default="00:30:00", help="limit of each job; default: %(default)s")
    parser.add_argument("--gpus-per-node", type=int)
    parser.add_argument("--tasks-per-node", type=int)
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for run folders, seen by all nodes")
    parser.add_argument("--spectra", type=Path, metavar="FOLDER", help="keep every run's spectra.h5 there")
    parser.add_argument("--plan", metavar="RECIPE", help="also plan this recipe on up to 4,096 GPUs of a site")
    parser.add_argument("--plan-site", default="horeka", metavar="NAME")
    return parser.parse_args()


def _numbers(text: str) -> list[int]:
    return sorted({int(word) for word in text.split(",")})


def _keys(options: argparse.Namespace) -> Iterator[Row]:
    """Runs in order: the same numbers of nodes of both sides one after the other, as the machine may drift."""
    fewest = options.nodes[0]
    for engine, nodes, scaling, side in itertools.product(options.engines, options.nodes, options.scalings, SIDES):
        if nodes > fewest or scaling == options.scalings[0]:
            yield {"recipe": options.recipe, "engine": engine, "scaling": scaling, "side": side, "nodes": nodes}


# -- one run -----------------------------------------------------------------------------------------


def _run(key: Row, options: argparse.Namespace, work: Path) -> Row:
    folder = work / "-".join(map(str, key.values())).replace("/", "_")
    per_node = options.tasks_per_node or options.gpus_per_node or 1
    processes = key["nodes"] * per_node
    batch = load_config(options.recipe).config.train.global_batch
    batch *= key["nodes"] // options.nodes[0] if key["scaling"] == "weak" else 1
    settings = [*SIDES[key["side"]], *OPTIMIZERS.get(key["engine"], [])]
    settings += ["--engine", key["engine"] if processes > 1 else "DDP"]
    settings += ["--train.steps", str(options.steps), "--train.global_batch", str(batch), "--train.evaluations", "1"]
    settings += ["--checkpoint.every", "null", "--record.every", "1"]
    settings += [f"--{word}" for word in options.settings]
    where: dict[str, Any] = {"nodes": key["nodes"], "tasks_per_node": per_node, "gpus_per_node": options.gpus_per_node}
    where |= {name: getattr(options, name) for name in ("site", "partition", "account")}
    if options.executor == "local":
        where = {"tasks_per_node": processes}
    jobs = submit(
        options.recipe, settings, folder=folder, executor=options.executor, time=options.time,
        **{name: value for name, value in where.items() if value is not None},
    )  # fmt: skip
    summary = jobs[0].result()
    if options.spectra is not None and (folder / "spectra.h5").exists():
        options.spectra.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "spectra.h5", options.spectra / f"{folder.name}.h5")
    step_s, joules = steady(folder)
    return key | {
        "processes": processes,
        "batch": batch,
        "step_s": step_s,
        "samples_per_s": batch / step_s,
        "sent_mb": _sent(key, settings, per_node),
        "update_share": summary["update_wall_s"] / summary["wall_s"],
        "peak_memory_gib": summary["peak_memory_gib"],
        "peak_rss_gib": summary["peak_rss_gib"],
        "joules_per_step": joules,
        "trained_share": summary["trainable_params"] / summary["dense_trainable_params"],
        "wall_s": summary["wall_s"],
    }


def steady(folder: Path) -> tuple[float, float | None]:
    """Median seconds, and joules if they could be read, of a step in the last phase of a run."""
    rows = read_metrics(folder / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row and "split" not in row]
    broken = {row["step"] for row in rows if "split" in row}
    if (folder / "updates.jsonl").exists():
        broken |= {row["step"] for row in read_metrics(folder / "updates.jsonl")}
    share = steps[-1]["trained_share"]
    begin = max((row["step"] for row in steps if row["trained_share"] != share), default=0) + SKIPPED
    # What happens after a step is in the time of the next one.
    pairs = [
        (last, row) for last, row in itertools.pairwise(steps) if last["step"] > begin and last["step"] not in broken
    ]
    if not pairs:
        sys.exit(f"{folder}: no steps between the last change of r and the end; more --steps are needed.")
    joules = [row["energy_J"] for _, row in pairs if row.get("energy_J") is not None]
    seconds = statistics.median(row["wall_s"] - last["wall_s"] for last, row in pairs)
    return seconds, statistics.median(joules) if joules else None


def _sent(key: Row, settings: Sequence[str], per_node: int) -> float:
    """Megabytes that a process hands to collectives in a step of the last phase."""
    config = load_config(key["recipe"], settings).config
    planner = Planner(Workload.of(config), gpu_machine(cluster("horeka")), memory_gib=math.inf)
    (row,) = planner.rows([key["nodes"]], per_node, config.engine, advise=False)
    return float(row["end_sent_mb" if key["side"] == "OIALR" else "dense_sent_mb"])


def _add_efficiency(rows: Sequence[Row]) -> None:
    for row in rows:
        same = [r for r in rows if all(r[name] == row[name] for name in ("recipe", "engine", "side"))]
        least = min(same, key=lambda r: r["nodes"])
        row["efficiency"] = (row["samples_per_s"] / row["nodes"]) / (least["samples_per_s"] / least["nodes"])


# -- the fitted formula ------------------------------------------------------------------------------


def fit(rows: Sequence[Row], cores: int | None) -> Row:
    """Seconds a sample of both sides, latency and bandwidth; and the mean relative error that is left."""
    sides = sorted({row["side"] for row in rows})
    terms = np.array([
        [_work(row, cores) if row["side"] == side else 0.0 for side in sides] + _messages(row) for row in rows
    ])  # fmt: skip
    seconds = np.array([row["step_s"] for row in rows])
    found = nonnegative(terms / seconds[:, None], np.ones(len(rows)))
    *per_sample, latency, inverse = found.tolist()
    return {
        "seconds_a_sample": dict(zip(sides, per_sample, strict=True)),
        "latency_s": latency,
        "bytes_per_s": 1 / inverse if inverse else None,
        "mean_relative_error": float(np.abs(terms @ found / seconds - 1).mean()),
    }


def _work(row: Row, cores: int | None) -> float:
    processes = row["processes"]
    return float(row["batch"] / processes * (1.0 if cores is None else max(1.0, processes / cores)))


def _messages(row: Row) -> list[float]:
    processes = row["processes"]
    share = (processes - 1) / processes
    return [2.0 * math.ceil(math.log2(processes)), 2 * share * 1e6 * row["sent_mb"]]


def nonnegative(A: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """``x >= 0`` with the least ``||A x - b||``, for few columns: the best of all sets of them that give none below 0."""
    best, least = np.zeros(A.shape[1]), float(b @ b)
    for size in range(1, A.shape[1] + 1):
        for columns in map(list, itertools.combinations(range(A.shape[1]), size)):
            x = np.linalg.lstsq(A[:, columns], b, rcond=None)[0]
            error = float(np.square(A[:, columns] @ x - b).sum())
            if x.min() >= 0 and error < least:
                best, least = np.zeros(A.shape[1]), error
                best[columns] = x
    return best


def extrapolate(found: Row, rows: Sequence[Row], engine: str) -> list[Row]:
    """Weak scaling by the formula, on processes that share no cores."""
    mine = [row for row in rows if row["engine"] == engine]
    fewest = min(row["nodes"] for row in mine)
    predicted = []
    for side, per_sample in found["seconds_a_sample"].items():
        first = next(row for row in mine if row["side"] == side and row["nodes"] == fewest)
        largest = max((row for row in mine if row["side"] == side), key=lambda row: row["processes"])
        batch, rate = first["batch"] / first["processes"], found["bytes_per_s"] or math.inf
        alone = batch * per_sample
        for processes in (2**i for i in range(int(math.log2(MOST)) + 1)):
            passes, size = _messages({"processes": processes, "sent_mb": largest["sent_mb"]})
            waiting = passes * found["latency_s"] + size / rate
            row = {"side": side, "processes": processes, "step_s": alone + waiting}
            predicted.append(row | {"efficiency": alone / (alone + waiting)})
    return predicted


def _planned(options: argparse.Namespace) -> list[Row]:
    """What ``oialr plan`` says of another recipe, on 4 to 4,096 GPUs."""
    per_node = cluster(options.plan_site).gpus_per_node
    nodes = [n for n in (1, 4, 16, 64, 256, 1024) if n * per_node <= MOST]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        words = ["plan", options.plan, "--weak", "--site", options.plan_site, "--nodes", ",".join(map(str, nodes))]
        subprocess.run([sys.executable, "-m", "hpc_oialr", *words, "--out", str(file)], check=True)
        plan = json.loads(file.read_text())
    shown = (
        "engine",
        "nodes",
        "processes",
        "global_batch",
        "dense_step_s",
        "end_step_s",
        "dense_sent_mb",
        "end_sent_mb",
    )
    return [{"grounds": plan["grounds"]}, *({key: row[key] for key in shown} for row in plan["rows"])]


if __name__ == "__main__":
    main()
