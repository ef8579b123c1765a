"""Parse Slurm's variables: the job of this process, short forms of node lists, tasks and GPUs."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hpc_oialr.errors import ConfigError, WorldError

_REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_NODES = re.compile(r"[^\[\],]+|[^\[\],]*(\[\d+(-\d+)?(,\d+(-\d+)?)*\][^\[\],]*)+")


@dataclass(frozen=True)
class SlurmJob:
    """A job."""

    id: str  # ARRAY_TASK in an array, whose last task has the array's own number
    restarts: int = 0  # how often it was requeued so far
    end: float | None = None  # Unix time (s), if Slurm sets it


def slurm_job(environ: Mapping[str, str] | None = None) -> SlurmJob | None:
    """The job this process runs in, if there is one."""
    env = os.environ if environ is None else environ
    number = env.get("SLURM_JOB_ID", "")
    if not number:
        return None
    array, task = env.get("SLURM_ARRAY_JOB_ID", ""), env.get("SLURM_ARRAY_TASK_ID", "")
    end = _whole(env.get("SLURM_JOB_END_TIME", ""))
    return SlurmJob(
        f"{array}_{task}" if array and task else number,
        _whole(env.get("SLURM_RESTART_COUNT", "")) or 0,
        None if end is None else float(end),
    )


def max_requeues(environ: Mapping[str, str] | None = None) -> int:
    """``OIALR_MAX_REQUEUES``: how often a job may be requeued, default 20; ConfigError if it is not a whole number."""
    text = (os.environ if environ is None else environ).get("OIALR_MAX_REQUEUES", "20")
    number = _whole(text)
    if number is None:
        raise ConfigError("OIALR_MAX_REQUEUES", text, "must be a whole number", origin="the environment")
    return number


def _whole(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def expand_nodes(text: str) -> list[str]:
    """Every node of a Slurm node list, in order, as ``scontrol show hostnames`` gives them; WorldError if it is none.

    >>> expand_nodes("a[01-03,7],b2")
    ['a01', 'a02', 'a03', 'a7', 'b2']
    >>> expand_nodes("r[1-2]n[0-1]")
    ['r1n0', 'r1n1', 'r2n0', 'r2n1']
    """
    nodes: list[str] = []
    try:
        # At the commas outside brackets.
        for pattern in re.split(r",(?![^\[]*\])", text.strip()):
            if _NODES.fullmatch(pattern) is None:
                raise ValueError
            # In turn a fixed part and the numbers of a bracket.
            parts = re.split(r"[\[\]]", pattern)
            choices = [_numbers(part) if i % 2 else [part] for i, part in enumerate(parts)]
            nodes += map("".join, itertools.product(*choices))
    except ValueError:
        raise WorldError(
            f"the node list is {text!r}; must look like 'a[01-03,7],b2', as Slurm sets SLURM_JOB_NODELIST. "
            "Set MASTER_ADDR to the first node's name to do without it."
        ) from None
    return nodes


def _numbers(bracket: str) -> list[str]:
    """Those of ``01-03,7``; ValueError if a range runs backwards."""
    numbers: list[str] = []
    for part in bracket.split(","):
        first, _, last = part.partition("-")
        found = range(int(first), int(last or first) + 1)
        if not found:
            raise ValueError
        numbers += (str(number).zfill(len(first)) for number in found)
    return numbers


def expand_counts(text: str) -> list[int]:
    """Tasks of each node from Slurm's short form; WorldError if it is none.

    >>> expand_counts("4(x2),3")
    [4, 4, 3]
    """
    matches = [_REPEATED.fullmatch(part) for part in text.strip().split(",")]
    if not all(matches):
        raise WorldError(f"tasks per node are {text!r}; must look like '4(x2),3', as Slurm sets SLURM_TASKS_PER_NODE.")
    return [int(match[1]) for match in matches if match for _ in range(int(match[2] or 1))]


def gpu_count(text: str) -> int | None:
    """How many GPUs ``SLURM_GPUS_PER_NODE`` means; None if it does not say.

    >>> gpu_count("4"), gpu_count("a100:4"), gpu_count("a100:2,v100:1"), gpu_count("a100")
    (4, 4, 3, 1)
    """
    counts = [part.rpartition(":")[2] for part in text.strip().split(",") if part]
    return sum(int(count) if count.isdigit() else 1 for count in counts) if counts else None
