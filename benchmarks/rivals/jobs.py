"""The queue: which runs there are, the processes that do them, and the file their rows are kept in."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.clock import load_libraries
from benchmarks.rivals.problems import PROBLEMS, Data, Judged
from benchmarks.rivals.sides import RATES, SIDES
from benchmarks.rivals.training import Length, OutOfTimeError, train
from benchmarks.row_file import Row
from hpc_oialr.errors import NonFiniteError

Mode = Literal["tune", "test", "time"]
KEY = ("mode", "problem", "side", "rate", "budget", "seed", "judged_on", "device")
TINY_STEPS = 8
# Steps of a run that is made for its times.
TIMED_STEPS = 100
# Steps before that on a GPU.
WARMING_STEPS = 12


@dataclass(frozen=True)
class Job:
    """One run: what a row begins with."""

    mode: Mode
    problem: str
    side: str
    rate: float
    budget: float
    seed: int

    def steps(self, *, tiny: bool) -> int:
        """Of the run it stands for."""
        reference = TINY_STEPS if tiny else PROBLEMS[self.problem].steps
        return max(2, round(self.budget * reference))


@dataclass(frozen=True)
class Setting:
    """What all runs of a call share."""

    device: str
    data: Path | None
    tiny: bool = False
    evaluations: int = 8
    threads: int = 1
    timed_steps: int = TIMED_STEPS

    def judged(self, mode: Mode) -> Judged:
        """What judges a run."""
        return "made-up data" if self.tiny else "validation" if mode == "tune" else "test"

    def head(self, job: Job) -> Row:
        """What a job's row begins with."""
        return {**asdict(job), "judged_on": self.judged(job.mode), "device": self.device}


_loaded: dict[tuple[str, str], Data] = {}


def work(job: Job, setting: Setting, deadline: float) -> Row:
    """Do one job in this process; never raises: a row says what failed, or that time was over."""
    head = setting.head(job)
    torch.set_num_threads(setting.threads)
    if time.time() > deadline:
        return {**head, "left_out": "the time was over"}
    try:
        return {**head, **_run(job, setting, deadline)}
    except OutOfTimeError:
        return {**head, "left_out": "the time was over before its end"}
    except NonFiniteError as error:
        return {**head, "failed": f"diverged: {error}"}
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        last = (str(error).strip().splitlines() or [""])[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        return {**head, "failed": f"{type(error).__name__}: {last[:300]} ({place})"}


def _run(job: Job, setting: Setting, deadline: float) -> Row:
    # Runs hold cycles; what is left of the last one would count as memory of the next.
    gc.collect()
    device = torch.device(setting.device)
    judged, steps = setting.judged(job.mode), job.steps(tiny=setting.tiny)
    if device.type == "cuda":
        load_libraries(device)
    if (job.problem, judged) not in _loaded:
        _loaded[job.problem, judged] = Data(PROBLEMS[job.problem], setting.data, judged, device)
    data, side = _loaded[job.problem, judged], SIDES[job.side]
    if job.mode != "time":
        length = Length(steps, evaluations=min(setting.evaluations, steps), deadline=deadline)
        return train(side, data, job.rate, job.seed, length)
    short = min(steps, setting.timed_steps)
    if device.type == "cuda":
        # Kernels are loaded when they are first used, which is no run's time.
        train(side, data, job.rate, job.seed, Length(WARMING_STEPS, 0, like=steps, deadline=deadline))
        gc.collect()
    return train(side, data, job.rate, job.seed, Length(short, 0, timed=True, like=steps, deadline=deadline))


def tuning(problems: Sequence[str], sides: Sequence[str]) -> list[Job]:
    """The grid of rates: all sides at the first rate of it, then at the others."""
    return [Job("tune", p, s, rate, 1.0, 0) for rate in RATES for s in sides for p in problems]


def testing(
    problems: Sequence[str], sides: Sequence[str], best: dict[tuple[str, str], float], budgets: Sequence[float],
    seeds: Sequence[int],
) -> list[Job]:  # fmt: skip
    """Every side at its best rate, all budgets with the first seed before the next one."""
    keys = [(p, s) for s in sides for p in problems if (p, s) in best]
    return [Job("test", p, s, best[p, s], b, seed) for seed in seeds for b in budgets for p, s in keys]


def timing(problems: Sequence[str], sides: Sequence[str], best: dict[tuple[str, str], float]) -> list[Job]:
    """Every side once."""
    return [Job("time", p, s, best.get((p, s), 1.0), 1.0, 0) for s in sides for p in problems]


def best_rates(rows: Iterable[Row]) -> dict[tuple[str, str], float]:
    """The rate of the best tuned run, by problem and side."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["mode"] != "tune" or row.get("metric") is None:
            continue
        key = row["problem"], row["side"]
        if key not in best or PROBLEMS[row["problem"]].better(row["metric"], best[key]["metric"]):
            best[key] = row
    return {key: row["rate"] for key, row in best.items()}


class Workers:
    """Processes that live as long as the call; one that dies takes its own job with it, and is replaced."""

    def __init__(self, setting: Setting, parallel: int) -> None:
        self.setting, self.parallel = setting, parallel
        self._pool: ProcessPoolExecutor | None = None

    def do(self, jobs: Sequence[Job], keep: Callable[[Row], None], seconds: float | None, *, alone: bool) -> None:
        """Do the jobs in their order, ``alone``: one at a time; each row is given to ``keep`` at once.

        After ``seconds`` no job is begun, and one under way is stopped.
        """
        deadline = math.inf if seconds is None else time.time() + seconds
        waiting, suspected = list(jobs), set[Job]()
        while waiting:
            done: set[Job] = set()
            chosen = waiting[:1] if alone else waiting
            try:
                futures = {self.pool.submit(work, job, self.setting, deadline): job for job in chosen}
                for future in as_completed(futures):
                    row = future.result()
                    done.add(futures[future])
                    keep(row)
            except BrokenProcessPool:
                # One of the jobs under way ended its process, the first ones that are not done.
                self._pool = None
                under_way = [job for job in chosen if job not in done][: self.parallel]
                for job in under_way:
                    if job in suspected or alone:
                        done.add(job)
                        keep({**self.setting.head(job), "failed": "its process died"})
                suspected |= set(under_way)
            waiting = [job for job in waiting if job not in done]
            # Those that may end a process again come last.
            waiting.sort(key=lambda job: job in suspected)

    @property
    def pool(self) -> ProcessPoolExecutor:
        """The processes."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            os.environ["OMP_NUM_THREADS"] = str(self.setting.threads)
            self._pool = ProcessPoolExecutor(self.parallel, mp_context=context)
        return self._pool

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None
