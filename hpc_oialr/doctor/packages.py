"""Python packages: installed versions against those that are required."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from hpc_oialr.distributed.environment import in_step
from hpc_oialr.doctor.context import CheckContext, Finding, ok, problem

_SELF = "hpc_oialr"


def check_packages(context: CheckContext) -> list[Finding]:
    """Required packages, and submitit where Slurm is."""
    wrong = [text for requirement in required("") if (text := mismatch(requirement))]
    findings = [ok("packages", f"Python {platform.python_version()}, torch {metadata.version('torch')}")]
    if wrong:
        findings = [problem("packages", "; ".join(wrong), f'pip install --upgrade "{_SELF}"')]
    # Other extras name themselves where they are needed, in a job's first seconds; a submission has none.
    (submitit,) = required("slurm")
    if (wrong_submitit := mismatch(submitit)) and context.has_slurm and not in_step(context.environ):
        fix = f'pip install --upgrade "{_SELF}[slurm]"'
        findings.append(problem("submitit", f"{wrong_submitit}: oialr submit cannot submit jobs", fix))
    return findings


def required(extra: str) -> Iterator[Requirement]:
    """What the package ("") or one of its extras requires on this machine."""
    for text in metadata.requires(_SELF) or ():
        requirement = Requirement(text)
        conditional = "extra" in str(requirement.marker or "")
        if conditional == bool(extra) and (requirement.marker is None or requirement.marker.evaluate({"extra": extra})):
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
