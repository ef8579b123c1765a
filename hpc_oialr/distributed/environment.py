"""Rank, world size and rendezvous from launcher variables.

The only module that reads launchers' environment variables. All functions take a mapping, default ``os.environ``.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hpc_oialr.distributed.slurm import expand_counts, expand_nodes, gpu_count
from hpc_oialr.errors import WorldError
from hpc_oialr.redaction import is_secret, mask_text

Environ = Mapping[str, str]

# Slurm gives steps without srun (batch script, interactive shell) the highest 32-bit numbers.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
# Below the ephemeral range (32768-60999), from which the kernel assigns ports.
_FIRST_PORT, _PORTS = 20_000, 12_768
_TRIES, _SPACING = 4, 4_099
# Open MPI's mpirun; srun --mpi=pmix; MPICH, Intel MPI and srun --mpi=pmi2.
_MPI_LAUNCH = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_FD")
_RECORDED = re.compile(
    r"(OMP|MKL|NCCL|GLOO|UCX|OMPI_MCA|HDF5|TORCH|PYTORCH|OIALR)_\w+|CUDA_VISIBLE_DEVICES|MASTER_(ADDR|PORT)"
    r"|SLURM_(JOB_(ID|NAME|NODELIST|PARTITION|NUM_NODES)|NTASKS|NNODES|TASKS_PER_NODE|CPUS_PER_TASK|GPUS_PER_NODE"
    r"|STEP_ID|RESTART_COUNT|ARRAY_JOB_ID|ARRAY_TASK_ID|CLUSTER_NAME)"
)
_STALE = "Unset stale RANK, WORLD_SIZE, SLURM_* or OMPI_* variables."


@dataclass(frozen=True)
class LaunchInfo:
    """One rank's place among all."""

    rank: int
    size: int
    local_rank: int  # among the ranks of its node
    local_size: int
    launcher: str  # "single", "torchrun", "slurm", "mpi" or "submitit" (its local executor)
    master_addr: str  # where rank 0 listens
    master_port: int
    spare_ports: tuple[int, ...] = ()  # if another program has that port
    token: str = field(default="", compare=False)  # tells this run from others that meet at the same port

    def __post_init__(self) -> None:
        ranks = {"rank": (self.rank, self.size), "local rank": (self.local_rank, self.local_size)}
        for what, (place, of) in ranks.items():
            if not 0 <= place < of:
                raise WorldError(f"{what} is {place} of {of} ({self.launcher}); must lie in [0, {of}). {_STALE}")
        if self.local_size > self.size:
            raise WorldError(
                f"{self.launcher} gives {self.local_size} ranks on this node but {self.size} in all; a "
                f"node cannot hold more than all. {_STALE}"
            )

    @property
    def ports(self) -> tuple[int, ...]:
        """All ports at which ranks may meet, in the order in which they are tried."""
        return (self.master_port, *self.spare_ports)


def launch_info(environ: Environ | None = None) -> LaunchInfo:
    """Find the launcher and this process's rank; WorldError if variables are missing or contradict each other.

    torchrun's RANK and WORLD_SIZE come first, also inside a Slurm job; then submitit's local executor; then mpirun, whose
    daemons may be a Slurm step; then srun. A shell inside an allocation, without srun, is one process.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env:
        return _from_torchrun(env)
    if "SUBMITIT_LOCAL_GLOBALID" in env:
        # submitit's local executor: all processes on this machine.
        rank, size = _number(env, "SUBMITIT_LOCAL_GLOBALID"), _number(env, "SUBMITIT_LOCAL_NTASKS")
        job = _required(env, "SUBMITIT_LOCAL_JOB_ID", "must be the number of the job")
        return LaunchInfo(rank, size, rank, size, "submitit", "127.0.0.1", *_ports(env, f"{job}.0"))
    if _number(env, "OMPI_COMM_WORLD_SIZE", 0) > 1 or ("OMPI_COMM_WORLD_SIZE" in env and not in_step(env)):
        names = [f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
        return _from_mpi(env, names, env.get("PMIX_NAMESPACE", "mpi"))
    if _number(env, "PMI_SIZE", 0) > 1:
        # MPICH, Intel MPI and srun --mpi=pmi2; only the last one agrees with Slurm's variables.
        place = (_number(env, "PMI_RANK"), _number(env, "PMI_SIZE"))
        if in_step(env) and place == (_number(env, "SLURM_PROCID"), _step_tasks(env)):
            return _from_slurm(env)
        return _from_mpi(env, ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"], "mpi")
    if in_step(env):
        return _from_slurm(env)
    if _number(env, "WORLD_SIZE", 1) > 1:
        raise WorldError(
            f"WORLD_SIZE is {env['WORLD_SIZE']} but RANK is not set; both must be, or none. Start with "
            "torchrun, srun or mpirun, or unset WORLD_SIZE."
        )
    return LaunchInfo(0, 1, 0, 1, "single", "127.0.0.1", *_ports(env, "single"))


def in_step(environ: Environ | None = None) -> bool:
    """Whether srun started this process; False in a batch script and in an ``salloc`` shell."""
    env = os.environ if environ is None else environ
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID"))
    return step is not None and step.isdigit() and int(step) < _FIRST_SPECIAL_STEP


def under_mpi(environ: Environ | None = None) -> bool:
    """Whether mpirun, or srun with an MPI plugin, started this process; False for a child of torchrun."""
    env = os.environ if environ is None else environ
    return "TORCHELASTIC_RUN_ID" not in env and any(name in env for name in _MPI_LAUNCH)


def node_name(environ: Environ | None = None) -> str:
    """This node's name; Slurm's where there is one, since several of its nodes may share a host."""
    env = os.environ if environ is None else environ
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def gpus_per_node(environ: Environ | None = None) -> int | None:
    """GPUs of this node that Slurm gave to the job, if it says so (``4`` or ``a100:4``)."""
    env = os.environ if environ is None else environ
    # The first is set for --gpus-per-node only, the second also for --gres=gpu:4 and the like.
    return gpu_count(env.get("SLURM_GPUS_PER_NODE") or env.get("SLURM_GPUS_ON_NODE", ""))


def usable_cores() -> int:
    """Cores that this process may use; fewer than the machine's in a job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def all_variables(environ: Environ | None = None) -> dict[str, str]:
    """A copy of all variables, for programs that are started with them."""
    return dict(os.environ if environ is None else environ)


def recorded_variables(environ: Environ | None = None) -> dict[str, str]:
    """Variables that change how a run behaves, without secrets."""
    env = os.environ if environ is None else environ
    kept = (name for name in sorted(env) if _RECORDED.fullmatch(name) and not is_secret(name))
    return {name: mask_text(env[name]) for name in kept}


def _from_torchrun(env: Environ) -> LaunchInfo:
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    tasks = _step_tasks(env) if in_step(env) else 1
    if size == 1 and tasks > 1 and "TORCHELASTIC_RUN_ID" not in env:
        raise WorldError(
            f"WORLD_SIZE is 1 but srun started {tasks} tasks; every task would train alone, into the same "
            "folder. Unset RANK and WORLD_SIZE, or start with torchrun."
        )
    if size == 1:
        return LaunchInfo(rank, 1, 0, 1, "torchrun", "127.0.0.1", *_ports(env, "torchrun"))
    local_rank = _number(env, "LOCAL_RANK")
    local_size = _number(env, "LOCAL_WORLD_SIZE", local_rank + 1)
    address = _required(env, "MASTER_ADDR", "must name the host of rank 0")
    _required(env, "MASTER_PORT", "must be a port that is free on the host of rank 0")
    return LaunchInfo(rank, size, local_rank, local_size, "torchrun", address, *_ports(env, "torchrun"))


def _from_mpi(env: Environ, names: list[str], salt: str) -> LaunchInfo:
    """``names``: the variables with rank, size, local rank and local size."""
    rank, size, local_rank, local_size = (_number(env, name) for name in names)
    if "MASTER_ADDR" in env:
        address = env["MASTER_ADDR"]
    elif size == local_size:
        address = "127.0.0.1"
    elif "SLURM_JOB_NODELIST" in env:
        address = expand_nodes(env["SLURM_JOB_NODELIST"])[0]
    else:
        raise WorldError(
            f"MASTER_ADDR is not set, and mpirun's {size} ranks are on several nodes; it must name the "
            "host of rank 0. Add: mpirun -x MASTER_ADDR=HOST (Open MPI), or -genv MASTER_ADDR HOST "
            "(MPICH, Intel MPI)."
        )
    return LaunchInfo(rank, size, local_rank, local_size, "mpi", address, *_ports(env, salt))


def _from_slurm(env: Environ) -> LaunchInfo:
    rank, size, node = _number(env, "SLURM_PROCID"), _step_tasks(env), _number(env, "SLURM_NODEID")
    # Many batch scripts export it for srun.
    if _number(env, "WORLD_SIZE", size) != size:
        raise WorldError(
            f"WORLD_SIZE is {env['WORLD_SIZE']} but srun started {size} tasks; they must agree. Remove "
            "WORLD_SIZE from the batch script (it is not needed), or correct --ntasks."
        )
    counts = expand_counts(_first_of(env, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    if node >= len(counts) or sum(counts) != size:
        raise WorldError(
            f"Slurm gives {size} tasks, and tasks per node {counts} seen from node {node}; their sum must be "
            "the number of tasks. Start every process by one srun."
        )
    address = env.get("MASTER_ADDR") or ("127.0.0.1" if len(counts) == 1 else _slurm_address(env))
    ports = _ports(env, f"{env.get('SLURM_JOB_ID', '0')}.{env.get('SLURM_STEP_ID', '0')}")
    return LaunchInfo(rank, size, _number(env, "SLURM_LOCALID"), counts[node], "slurm", address, *ports)


def _step_tasks(env: Environ) -> int:
    return int(_first_of(env, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"))


def _slurm_address(env: Environ) -> str:
    """The node of task 0: the first of the sorted list, unless a host file placed the tasks (``-m arbitrary``)."""
    if env.get("SLURM_DISTRIBUTION") != "arbitrary":
        nodes = _first_of(env, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
        return expand_nodes(nodes)[0]
    try:
        # SLURM_ARBITRARY_NODELIST is sorted, so it does not tell the order.
        lines = Path(env["SLURM_HOSTFILE"]).read_text(encoding="utf-8").split()
        return expand_nodes(lines[0])[0]
    except (KeyError, OSError, UnicodeDecodeError, IndexError):
        raise WorldError(
            "SLURM_DISTRIBUTION is arbitrary, and there is no host file (SLURM_HOSTFILE) here that says which node has "
            "task 0. Set MASTER_ADDR to that node."
        ) from None


def _ports(env: Environ, salt: str) -> tuple[int, tuple[int, ...], str]:
    """MASTER_PORT alone, or ports derived from the job's number, and the run's token.

    Neighbouring jobs start at different ports. Ports repeat after 798 job ids, hence the token.
    """
    if "MASTER_PORT" in env:
        return _number(env, "MASTER_PORT"), (), salt
    job, _, step = salt.partition(".")
    number = zlib.crc32(salt.encode())
    if job.isdigit() and step.isdigit():
        number = int(job) * 16 + int(step) % 16
    first, *spare = (_FIRST_PORT + (number + i * _SPACING) % _PORTS for i in range(_TRIES))
    return first, tuple(spare), salt


def _number(env: Environ, name: str, default: int | None = None) -> int:
    if name not in env and default is not None:
        return default
    text = _required(env, name, "must be a whole number")
    if not text.strip().isdigit():
        raise WorldError(f"{name} is {text!r}; must be a whole number. The launcher sets it: do not set it by hand.")
    return int(text)


def _required(env: Environ, name: str, rule: str) -> str:
    if name not in env:
        raise WorldError(
            f"{name} is not set; {rule}. torchrun, srun and mpirun set what is needed: start with one of "
            "them, or unset RANK to run one process."
        )
    return env[name]


def _first_of(env: Environ, *names: str) -> str:
    for name in names:
        if name in env:
            return env[name]
    raise WorldError(
        f"none of {', '.join(names)} is set inside a Slurm step; srun sets them. Pass --export=ALL to srun."
    )
