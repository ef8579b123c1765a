"""Threads of a process against the cores it may use."""

from __future__ import annotations

import os

from hpc_oialr.doctor.context import CheckContext
from hpc_oialr.doctor.finding import Finding, ok, problem
from hpc_oialr.processes.environment import usable_cores


def check_threads(context: CheckContext) -> list[Finding]:
    """OMP_NUM_THREADS against what one process, and all of its node, have."""
    return [
        judge_threads(context, usable_cores(), os.cpu_count() or 1),
        *judge_binding(context, usable_cores()),
    ]


def judge_threads(context: CheckContext, cores: int, of_node: int) -> Finding:
    """Whether threads outnumber cores.

    Parameters
    ----------
    cores
        That this process may run on.
    of_node
        All of the node's.
    """
    text, given = context.environ.get("OMP_NUM_THREADS"), _cpus_per_task(context)
    # Processes that are not bound see the same cores, and share them.
    share = max(1, min(cores, of_node // context.local_size))
    fair = min(given, cores) if given else share
    if text is None:
        return ok("threads", f"as many as cores: {cores}, {context.local_size} on the node share {of_node}")
    number = text.partition(",")[0].strip()
    if not number.isdigit() or int(number) < 1:
        fix = f"export OMP_NUM_THREADS={fair}"
        return problem("threads", f"OMP_NUM_THREADS is {text!r}; must be a whole number", fix)
    threads, fix = int(number), f"export OMP_NUM_THREADS={fair}"
    if threads > cores:
        return problem(
            "threads", f"OMP_NUM_THREADS is {threads}, but this process may run on {cores} cores", fix
        )
    if given and threads > given:
        return problem("threads", f"OMP_NUM_THREADS is {threads}, but a task has {given} cores", fix)
    if threads * context.local_size > of_node:
        found = f"{context.local_size} processes with {threads} threads each share {of_node} cores of {context.node}"
        return problem("threads", found, fix)
    return ok("threads", f"{threads} on {cores} cores, {context.local_size} on the node share {of_node}")


def judge_binding(context: CheckContext, cores: int) -> list[Finding]:
    """Whether srun bound a task to fewer cores than the job asked for; since Slurm 22.05 it does if not told."""
    given = _cpus_per_task(context)
    if given is None or not context.in_step:
        return []
    if cores < given:
        found = f"SLURM_CPUS_PER_TASK is {given}, but srun bound this task to {cores}"
        fix = "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK   (in the batch script, before srun)"
        return [problem("binding", found, fix)]
    return [ok("binding", f"{cores} cores, {given} asked for")]


def _cpus_per_task(context: CheckContext) -> int | None:
    text = context.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(text) if text.isdigit() and int(text) else None
