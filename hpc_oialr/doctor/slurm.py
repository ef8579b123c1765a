"""Slurm: programs, controller, partition, the job itself."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import NamedTuple

from hpc_oialr.commands import Answer
from hpc_oialr.doctor.context import SLURM_PROGRAMS, CheckContext, Finding, note, ok, problem

_CREDENTIALS = re.compile(r"munge|authentication|auth_g_|credential", re.IGNORECASE)


class Partition(NamedTuple):
    """A row of sinfo's table."""

    name: str
    default: bool
    state: str  # "up", "down", "drain" or "inact"
    works: bool  # whether jobs start there


def check_programs(context: CheckContext) -> list[Finding]:
    """Slurm's programs; without any of them nothing else of Slurm is checked."""
    missing = [name for name in SLURM_PROGRAMS if context.find(name) is None]
    if not missing:
        return [ok("Slurm programs", ", ".join(SLURM_PROGRAMS))]
    if len(missing) < len(SLURM_PROGRAMS):
        fix = "module load slurm, or, as root: apt-get install slurm-client"
        return [problem("Slurm programs", f"missing: {', '.join(missing)}", fix)]
    if "SLURM_JOB_ID" in context.environ:
        return [note("Slurm programs", "none inside this job, as in most containers")]
    return [note("Slurm", "no Slurm here")]


def check_cluster(context: CheckContext) -> list[Finding]:
    """Controller, credentials and partition, by one request."""
    answer = context.run("sinfo", "--noheader", "--all", "--format=%P|%a|%F")
    if answer.code != 0:
        return [_unreachable(context, answer)]
    partitions = []
    # E.g. main*|up|3/0/1/4: the default one has a star; nodes are allocated, idle, down or drained, in all.
    for name, state, counts in (row.split("|") for row in answer.stdout.split() if row.count("|") == 2):
        allocated, idle, *_ = map(int, counts.split("/"))
        works = state == "up" and allocated + idle > 0
        partitions.append(Partition(name.rstrip("*"), name.endswith("*"), state, works))
    findings = [ok("slurmctld", f"answers; partitions: {', '.join(p.name for p in partitions) or 'none'}")]
    if context.find("munge"):
        findings.append(ok("munge", "the controller took this user's credential"))
    return [*findings, _partition(context, partitions)]


def _unreachable(context: CheckContext, answer: Answer) -> Finding:
    """Why sinfo failed: no credential, no configuration, or no controller."""
    lines = [line for line in answer.stderr.splitlines() if _CREDENTIALS.search(line)]
    if lines:
        # sinfo begins with a hint for busy machines.
        said = next((line for line in lines if "failed" in line), lines[-1]).removeprefix("sinfo: error: ")
        fix = f"systemctl start munge   (as root on {context.node}; otherwise tell the administrators)"
        return problem("munge", f"this user gets no credential: {said}", fix)
    fix = "scontrol ping   (if that says DOWN, or hangs as well, only the administrators can help)"
    if "configuration source" in answer.stderr or "slurm.conf" in answer.stderr:
        fix = "export SLURM_CONF=/etc/slurm/slurm.conf   (or wherever the cluster keeps it)"
    found = answer.reason if answer.reason.startswith("sinfo") else f"sinfo: {answer.reason}"
    return problem("slurmctld", found, fix)


def _partition(context: CheckContext, partitions: Sequence[Partition]) -> Finding:
    """The partition that is asked for, or the cluster's default one."""
    by_name = {partition.name: partition for partition in partitions}
    first = next(iter(by_name), "NAME")
    default = next((p.name for p in partitions if p.default), None)
    names = context.partition.split(",") if context.partition else [default] if default else []
    if not names:
        return note("partition", "the cluster has no default one", f"--partition {first}")
    unknown = [name for name in names if name not in by_name]
    if unknown:
        near = difflib.get_close_matches(unknown[0], by_name, n=1)
        found = f"there is no {unknown[0]!r}; there are: {', '.join(by_name) or 'none'}"
        return problem("partition", found, f"--partition {(near or [default or first])[0]}")
    idle = [by_name[name] for name in names if not by_name[name].works]
    if idle:
        others = [other.name for other in partitions if other.works]
        fix = "sinfo -R   (why nodes are down; the administrators can help)"
        fix = f"--partition {others[0]}" if others else fix
        down = "has no node that is not down or drained"
        state = down if idle[0].state == "up" else f"is {idle[0].state}"
        return problem("partition", f"{idle[0].name!r} {state}; jobs there do not start", fix)
    return ok("partition", f"{','.join(names)} is up" + ("" if context.partition else " (the default)"))


def check_job(context: CheckContext) -> list[Finding]:
    """Whether the job that the variables name still runs: a shell may have outlived it."""
    job = context.environ.get("SLURM_JOB_ID")
    if job is None:
        return []
    answer = context.run("squeue", "--noheader", f"--jobs={job}", "--format=%T")
    states = answer.stdout.split()
    if answer.code == 0 and states:
        return [ok("job", f"{job} is {states[0]}")]
    if answer.code == 0 or "Invalid job id" in answer.stderr:
        found = f"SLURM_JOB_ID is {job}, but there is no such job any more"
        return [problem("job", found, "unset ${!SLURM_@}")]
    return []
