"""Python packages: installed versions against those that the package and its extras require."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from hpc_oialr.distributed.environment import in_step
from hpc_oialr.doctor.context import CheckContext, Finding, note, ok, problem

_SELF = "hpc_oialr"


def check_packages(context: CheckContext) -> list[Finding]:
    """Required packages, then the extras: those that are installed must fit, submitit must be where Slurm is."""
    wrong = [text for requirement in required("") if (text := mismatch(requirement))]
    found = f"Python {platform.python_version()}, torch {metadata.version('torch')}"
    findings = [ok("packages", found)]
    if wrong:
        findings = [problem("packages", "; ".join(wrong), f'pip install --upgrade "{_SELF}"')]
    absent = []
    for extra in metadata.metadata(_SELF).get_all("Provides-Extra") or []:
        needs = list(required(extra))
        if any(need.name == _SELF for need in needs):
            continue  # an extra that only gathers others
        states = [mismatch(need) for need in needs]
        if any("missing" in state for state in states):
            absent.append(extra)
        elif any(states):
            fix = f'pip install --upgrade "{_SELF}[{extra}]"'
            findings.append(problem(f"[{extra}]", "; ".join(filter(None, states)), fix))
    if "slurm" in absent and context.has_slurm and not in_step(context.environ):
        absent.remove("slurm")
        fix = f'pip install "{_SELF}[slurm]"'
        findings.append(problem("submitit", "missing: oialr submit cannot submit jobs", fix))
    if absent:
        fix = f'pip install "{_SELF}[{",".join(absent)}]"'
        findings.append(note("extras", f"not installed: {', '.join(absent)}; runs do without", fix))
    return findings


def required(extra: str) -> Iterator[Requirement]:
    """What the package ("") or one of its extras requires on this machine."""
    for text in metadata.requires(_SELF) or ():
        requirement = Requirement(text)
        conditional = "extra" in str(requirement.marker or "")
        if conditional == bool(extra) and (
            requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        ):
            yield requirement


def mismatch(requirement: Requirement) -> str:
    """What is wrong with an installed package; "" if nothing is."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} is {version}; must be {requirement.specifier}"
