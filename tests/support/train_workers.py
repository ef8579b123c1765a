"""Functions that tests run in several processes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from hpc_oialr.record import read_metrics
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train
from hpc_oialr.train.tasks import LanguageModelling
from hpc_oialr.train.timing import StopRequest


def train_worker(rank: int, size: int, recipe: str, folder: str, stop_at: int | None = None) -> dict[str, Any] | None:
    """Train a recipe, stopping after ``stop_at`` steps; the summary."""
    stop = None if stop_at is None else stop_at_step(stop_at)
    return train(load_config(recipe), Path(folder), stop=stop).summary


def slow_worker(rank: int, size: int, recipe: str, folder: str, slow: int, delay_s: float) -> None:
    """Train a recipe while the forward passes of one rank take longer."""
    if rank == slow:
        quick = LanguageModelling.loss

        def loss(*arguments: Any) -> Any:
            time.sleep(delay_s)
            return quick(*arguments)

        LanguageModelling.loss = loss  # type: ignore[method-assign]
    train(load_config(recipe), Path(folder))


def stop_at_step(step: int) -> StopRequest:
    """A request made after so many steps; one process stops there, several after the next one."""
    asked = iter(range(1, 10_000))
    return StopRequest(lambda: "the test" if next(asked) >= step else "")


def resume_worker(rank: int, size: int, folder: str, *settings: str) -> dict[str, Any] | None:
    """Resume a run, with settings on top; the summary."""
    return resume(Path(folder), settings=settings).summary


def losses(folder: Path) -> list[float]:
    """Training losses of a run, step by step."""
    return [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "metric" not in row]
