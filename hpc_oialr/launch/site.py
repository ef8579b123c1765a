"""What a cluster's site file asks for: options of sbatch and of srun, as its batch scripts take them too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpc_oialr.distributed.slurm_lists import gpu_count
from hpc_oialr.errors import ConfigError, OIALRError, UnknownNameError
from hpc_oialr.launch.programs import ORDER_S, NoAnswerError, ask
from hpc_oialr.launch.request import Request

_FOLDER = Path(__file__).parent / "sites"
# Outside a job a site file stops before what is for the job.
_READ = """set -eo pipefail
unset SLURM_JOB_ID
SITE_SBATCH=() SITE_SRUN=() SITE_MPI=
source "$1" >/dev/null
printf '%s\\0' "${#SITE_SBATCH[@]}" "${SITE_SBATCH[@]}" "${SITE_SRUN[@]}" ${SITE_MPI:+"--mpi=$SITE_MPI"}
"""
# What a site may ask for that is a parameter of a request too.
_OF_REQUEST = {
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "constraint": "constraint",
    "exclude": "exclude",
    "ntasks-per-node": "tasks_per_node",
    "cpus-per-task": "cpus_per_task",
    "gpus-per-node": "gpus_per_node",
}


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """A cluster's options.

    Attributes
    ----------
    file
        The site file; None for a cluster without one.
    sbatch
        Options of sbatch by their long names, e.g. ``{"gres": "gpu:4"}``; an empty value for a bare option.
    srun
        Options of srun.
    """

    file: Path | None = None
    sbatch: Mapping[str, str] = field(default_factory=dict)
    srun: tuple[str, ...] = ()


def read_site(site: str | None) -> ClusterConfig:
    """Run a site file as a login node does.

    Raises
    ------
    UnknownNameError
        If there is none of this name; lists those there are.
    OIALRError
        If it fails, or gives an option in a short form.
    """
    if site is None:
        return ClusterConfig()
    file = site_file(site)
    try:
        answer = ask(["bash", "-c", _READ, "site", str(file)], timeout_s=ORDER_S).stdout
    except NoAnswerError as error:
        raise OIALRError(f"the site file {file} does not run here: {error}.") from None
    count, *words = answer.split("\0")[:-1]
    options = dict(_options(words[: int(count)], file))
    return ClusterConfig(file=file, sbatch=options, srun=tuple(words[int(count) :]))


def at_site(request: Request, site: ClusterConfig) -> tuple[Request, ClusterConfig]:
    """A request with the site's options where it leaves them open, and the site with those that remain.

    Raises
    ------
    ConfigError
        If the site asks for what cannot be; names its file.
    """
    rest = dict(site.sbatch)
    given: dict[str, Any] = {}
    for option, name in _OF_REQUEST.items():
        value = rest.pop(option, None)
        if value is not None and getattr(request, name) is None:
            given[name] = int(value) if value.isdigit() else value
    if "gres" in rest:
        given, rest["gres"] = _with_gpus(request, given, rest["gres"])
    try:
        return replace(request, **given), replace(
            site, sbatch={k: v for k, v in rest.items() if k != "gres" or v}
        )
    except ConfigError as error:
        raise error.with_context(origin=str(site.file)) from None


def _with_gpus(request: Request, given: dict[str, Any], gres: str) -> tuple[dict[str, Any], str]:
    """One process for each GPU among generic resources; these without GPUs if the request names its own."""
    parts = gres.split(",")
    gpus = [part.partition(":")[2] or "1" for part in parts if _is_gpu(part)]
    if request.gpus_per_node is not None:
        return given, ",".join(part for part in parts if not _is_gpu(part))
    if gpus and request.tasks_per_node is None:
        given = {"tasks_per_node": gpu_count(gpus[0]), **given}
    return given, gres


def _is_gpu(resource: str) -> bool:
    return resource.partition(":")[0] == "gpu"


def _options(words: Sequence[str], file: Path) -> Iterator[tuple[str, str]]:
    """Names and values of ``--name=value``, ``--name value`` and ``--name``."""
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--"):
            raise OIALRError(
                f"SITE_SBATCH of {file} holds {name!r}; must hold long options. E.g. --partition=NAME."
            )
        if not equals and rest and not rest[0].startswith("-"):
            value = rest.pop(0)
        yield name[2:], value


def site_file(site: str) -> Path:
    """The site file of a name, or of a path.

    Raises
    ------
    UnknownNameError
        Listing the names there are.
    """
    given = Path(site)
    if given.suffix == ".sh" and given.is_file():
        return given.resolve()
    named = _FOLDER / f"{site}.sh"
    if named.is_file():
        return named
    raise UnknownNameError("site", site, (path.stem for path in _FOLDER.glob("*.sh")))
