"""Slurm's compressed lists: nodes ``a[01-03,7],b2`` and tasks per node ``4(x2),3``."""

from __future__ import annotations

import re

from hpc_oialr.errors import WorldError

_REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


def expand_nodes(text: str) -> list[str]:
    """Every node of a Slurm node list, in order, as ``scontrol show hostnames`` gives them.

    Raises
    ------
    WorldError
        If brackets do not match or a range is not one.

    Examples
    --------
    >>> expand_nodes("a[01-03,7],b2")
    ['a01', 'a02', 'a03', 'a7', 'b2']
    >>> expand_nodes("r[1-2]n[0-1]")
    ['r1n0', 'r1n1', 'r2n0', 'r2n1']
    """
    return [node for pattern in _split(text) for node in _expand(pattern, text)]


def _split(text: str) -> list[str]:
    """Cut at the commas outside brackets."""
    parts, depth = [""], 0
    for char in text.strip():
        depth += (char == "[") - (char == "]")
        if depth not in (0, 1):
            raise _bad_list(text)
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    if depth or not all(parts):
        raise _bad_list(text)
    return parts


def _expand(pattern: str, text: str) -> list[str]:
    head, bracket, rest = pattern.partition("[")
    if not bracket:
        return [head]
    inside, _, tail = rest.partition("]")
    tails = _expand(tail, text)
    numbers = [number for part in inside.split(",") for number in _numbers(part, text)]
    return [f"{head}{number}{end}" for number in numbers for end in tails]


def _numbers(part: str, text: str) -> list[str]:
    match = _RANGE.fullmatch(part)
    if match is None or (match[2] and int(match[2]) < int(match[1])):
        raise _bad_list(text)
    first, last = match[1], match[2] or match[1]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def expand_counts(text: str) -> list[int]:
    """Tasks of each node from Slurm's short form.

    Raises
    ------
    WorldError
        If the text is of another form.

    Examples
    --------
    >>> expand_counts("4(x2),3")
    [4, 4, 3]
    """
    matches = [_REPEATED.fullmatch(part) for part in text.strip().split(",")]
    if not all(matches):
        raise WorldError(
            f"tasks per node are {text!r}; must look like '4(x2),3', as Slurm sets SLURM_TASKS_PER_NODE."
        )
    return [int(match[1]) for match in matches if match for _ in range(int(match[2] or 1))]


def gpu_count(text: str) -> int | None:
    """How many GPUs ``SLURM_GPUS_PER_NODE`` means; None if it does not say.

    Examples
    --------
    >>> gpu_count("4"), gpu_count("a100:4"), gpu_count("a100:2,v100:1"), gpu_count("a100")
    (4, 4, 3, 1)
    """
    counts = [part.rpartition(":")[2] for part in text.strip().split(",") if part]
    if not counts:
        return None
    return sum(int(count) if count.isdigit() else 1 for count in counts)


def _bad_list(text: str) -> WorldError:
    return WorldError(
        f"the node list is {text!r}; must look like 'a[01-03,7],b2', as Slurm sets SLURM_JOB_NODELIST. "
        "Set MASTER_ADDR to the first node's name to do without it."
    )
