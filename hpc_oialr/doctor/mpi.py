"""MPI: mpi4py and its library, srun's plugins, and whether MPI and the launcher agree on rank and size."""

from __future__ import annotations

import re
from typing import Any

from hpc_oialr.commands import Answer
from hpc_oialr.distributed.environment import in_step, under_mpi
from hpc_oialr.doctor.context import CheckContext, Finding, note, ok, problem

_EXTRA = 'pip install "hpc_oialr[mpi]"'
_WITHOUT = "runs do without, over gloo"
_LISTED = re.compile(r"\b(pmix|pmi2|cray_shasta)(?:_v\d+)?\b")
# Plugins of srun that start programs of a library, best first, by the first words of the library's version.
_PLUGINS = {"open mpi": ("pmix",), "cray": ("cray_shasta", "pmi2")}
_OTHER_PLUGINS = ("pmi2", "pmix")


def check_mpi(context: CheckContext) -> list[Finding]:
    """Load MPI in a process of its own; start it there, except in a step of srun without MPI."""
    by_mpi = under_mpi(context.environ)
    start = by_mpi or not in_step(context.environ)
    report, answer = context.probe("mpi", "start" if start else "load", slow=True)
    library = report.get("library")
    if library is None:
        return [_not_loaded(context, report, answer)]
    findings = [ok("MPI", f"mpi4py {report['mpi4py']}, {library}")]
    if by_mpi:
        findings.append(rank_finding(context, report, answer))
    elif start and not report.get("ended"):
        findings[0] = note("MPI", f"{library} does not start here: {answer.reason}; {_WITHOUT}")
    if context.is_main and context.find("srun"):
        answer = context.run("srun", "--mpi=list")
        # If it fails, the check of the controller has the reason.
        if answer.code == 0:
            wanted = context.environ.get("OIALR_MPI") or context.environ.get("SITE_MPI", "")
            findings.append(plugin_finding(library, answer.stdout + answer.stderr, wanted))
    return findings


def _not_loaded(context: CheckContext, report: dict[str, Any], answer: Answer) -> Finding:
    """A problem only where MPI started the processes: other runs do not use it."""
    if report.get("missing") == "mpi4py":
        found, fix = f"no mpi4py ({report['error']})", _EXTRA
    elif report.get("missing") == "library":
        found = f"mpi4py finds no MPI library ({report['error']})"
        fix = "module load openmpi, or, as root: apt-get install openmpi-bin"
    else:
        found, fix = f"mpi4py cannot be loaded: {answer.reason}", f"pip uninstall mpi4py; {_EXTRA}"
    if under_mpi(context.environ):
        return problem("MPI", f"{found}, and MPI started this process", fix)
    return note("MPI", f"{found}; {_WITHOUT}", fix)


def rank_finding(context: CheckContext, report: dict[str, Any], answer: Answer) -> Finding:
    """Whether MPI gives this process the launcher's rank and size."""
    library, place = report["library"], context.place
    how = f"srun --mpi={plugins_for(library)[0]}   (or the library's own mpirun; --mpi=none does without MPI)"
    if "rank" not in report:
        return problem("MPI ranks", f"{library} does not start: {answer.reason}", how)
    if place is None:
        return note("MPI ranks", f"rank {report['rank']} of {report['size']}")
    found = f"{library} counts rank {report['rank']} of {report['size']}"
    if (report["rank"], report["size"]) != (place.rank, place.size):
        return problem("MPI ranks", f"{found}, {place.launcher} counts {place.rank} of {place.size}", how)
    if not report.get("ended"):
        return problem("MPI ranks", f"{found}, but MPI does not end: {answer.reason}", how)
    return ok("MPI ranks", f"{found}, as {place.launcher} does")


def plugin_finding(library: str, listed: str, wanted: str = "") -> Finding:
    """Whether srun has a plugin for the library, and batch scripts take it (``wanted``, unless "").

    ``listed`` is what ``srun --mpi=list`` prints.
    """
    lines = [line for line in listed.splitlines() if "plugin types" not in line]
    plugins = list(dict.fromkeys(match[1] for line in lines for match in _LISTED.finditer(line)))
    fits = [plugin for plugin in plugins_for(library) if plugin in plugins]
    if not fits:
        needs, has = " or ".join(plugins_for(library)), ", ".join(plugins) or "none"
        found = f"{library} needs srun's plugin {needs}, which has: {has}; every process would be rank 0 of 1"
        fix = "srun --mpi=none, or the library's own mpirun (for pmix: libpmix2)"
        return problem("MPI plugin", found, fix)
    if wanted not in ("", "none", *fits):
        found = f"batch scripts take srun --mpi={wanted}; {library} needs {fits[0]}"
        return problem("MPI plugin", found, f"export OIALR_MPI={fits[0]}")
    return ok("MPI plugin", f"{library}: srun --mpi={fits[0]}")


def plugins_for(library: str) -> tuple[str, ...]:
    """Plugins of srun that start programs of a library, best first.

    >>> plugins_for("Open MPI v4.1.4"), plugins_for("Intel(R) MPI Library 2021.13")
    (('pmix',), ('pmi2', 'pmix'))
    """
    return next((fit for name, fit in _PLUGINS.items() if library.lower().startswith(name)), _OTHER_PLUGINS)
