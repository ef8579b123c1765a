"""Site files: a cluster's options of sbatch and srun, and its variables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpc_oialr.commands import run_command
from hpc_oialr.distributed.environment import all_variables
from hpc_oialr.distributed.slurm import gpu_count
from hpc_oialr.errors import ConfigError, OIALRError, UnknownNameError
from hpc_oialr.launch.request import Request
from hpc_oialr.launch.slurm import ORDER_S

_FOLDER = Path(__file__).parent / "sites"
# Prints number and words of SITE_SBATCH, number and words of SITE_SRUN, then all variables; each ends with a NUL.
_READ = """set -eo pipefail
SITE_SBATCH=() SITE_SRUN=() SITE_MPI=
source "$1" >/dev/null
[ -z "$SITE_MPI" ] || SITE_SRUN+=("--mpi=$SITE_MPI")
printf '%s\\0' "${#SITE_SBATCH[@]}" "${SITE_SBATCH[@]}" "${#SITE_SRUN[@]}" "${SITE_SRUN[@]}"
export SITE_MPI
[ -z "${OIALR_RUNS:-}" ] || export OIALR_RUNS
env -0
"""
# Options of sbatch that are parameters of a request, too.
_OF_REQUEST = {
    **{name: name for name in ("partition", "account", "qos", "constraint", "exclude")},
    "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "gpus-per-node": "gpus_per_node",
}


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """What a site file says."""

    file: Path | None = None  # None: no site
    # By long name, {"gres": "gpu:4"}; "" for a bare option.
    sbatch: Mapping[str, str] = field(default_factory=dict)
    srun: tuple[str, ...] = ()
    environ: Mapping[str, str] = field(default_factory=dict)  # all variables, once the file was sourced


def read_site(site: str | None, *, in_job: bool = False) -> ClusterConfig:
    """Source a site file, on a login node or (``in_job``) with its part for jobs if this is one.

    Raises :class:`OIALRError` if there is no such site, the file fails, or gives an option in a short form.
    """
    if site is None:
        return ClusterConfig(environ=all_variables())
    file = Path(site).resolve() if site.endswith(".sh") else _FOLDER / f"{site}.sh"
    if not file.is_file():
        raise UnknownNameError("site", site, (path.stem for path in _FOLDER.glob("*.sh")))
    environ = all_variables()
    if not in_job:
        # Outside a job a site file stops before its part for jobs.
        environ.pop("SLURM_JOB_ID", None)
    answer = run_command(["bash", "-c", _READ, "site", str(file)], timeout_s=ORDER_S, environ=environ)
    if answer.code != 0:
        raise OIALRError(f"the site file {file} does not run here: {answer.reason}.")
    words = answer.stdout.split("\0")[:-1]
    sbatch, words = words[1 : 1 + int(words[0])], words[1 + int(words[0]) :]
    srun, variables = words[1 : 1 + int(words[0])], words[1 + int(words[0]) :]
    pairs = (text.partition("=") for text in variables)
    return ClusterConfig(
        file=file,
        sbatch=dict(_options(sbatch, file)),
        srun=tuple(srun),
        environ={name: value for name, _, value in pairs},
    )


def _options(words: Sequence[str], file: Path) -> Iterator[tuple[str, str]]:
    """Names and values of ``--name=value``, ``--name value`` and ``--name``."""
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise OIALRError(f"SITE_SBATCH of {file} holds {name!r}; must hold long options. E.g. --partition=NAME.")
        if not equals and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        yield name[2:], value


def at_site(request: Request, site: ClusterConfig) -> tuple[Request, ClusterConfig]:
    """A request completed by the site's options, and the site with its remaining ones.

    Raises :class:`ConfigError` that names the site file if an option of it has a wrong value.
    """
    rest = dict(site.sbatch)
    given: dict[str, Any] = {}
    for option, name in _OF_REQUEST.items():
        value = rest.pop(option, None)
        if value is not None and getattr(request, name) is None:
            given[name] = int(value) if value.isdigit() else value
    resources = [text.partition(":") for text in rest.get("gres", "").split(",") if text]
    gpus = [number or "1" for name, _, number in resources if name == "gpu"]
    if gpus and request.gpus_per_node is not None:
        # The request's GPUs replace the site's.
        del rest["gres"]
        if others := ",".join("".join(parts) for parts in resources if parts[0] != "gpu"):
            rest["gres"] = others
    elif gpus and request.tasks_per_node is None:
        given.setdefault("tasks_per_node", gpu_count(gpus[0]))
    try:
        return replace(request, **given), replace(site, sbatch=rest)
    except ConfigError as error:
        raise error.with_context(origin=str(site.file)) from None
