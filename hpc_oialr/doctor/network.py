"""How processes find each other: the launcher's variables and the address of rank 0."""

from __future__ import annotations

import socket

from hpc_oialr.distributed.environment import in_step, launch_info, under_mpi
from hpc_oialr.doctor.context import CheckContext, Finding, note, ok, problem
from hpc_oialr.errors import WorldError

_STARTING = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
]


def check_launcher(context: CheckContext) -> list[Finding]:
    """What started this process, and whether its variables can be true."""
    try:
        place = launch_info(context.environ)
    except WorldError as error:
        return [problem("launcher", str(error), unset(context))]
    where = f"rank {place.rank} of {place.size}, {place.local_rank} of {place.local_size} on {context.node}"
    if by_hand(context):
        found = f"{where}, by RANK and WORLD_SIZE alone: no torchrun, srun or mpirun started it"
        return [note("launcher", found, unset(context))]
    return [ok("launcher", f"{place.launcher}: {where}" if place.size > 1 else "one process")]


def by_hand(context: CheckContext) -> bool:
    """Whether only RANK makes this one of several processes: it may be a leftover."""
    env = context.environ
    launched = "TORCHELASTIC_RUN_ID" in env or in_step(env) or under_mpi(env)
    return context.size > 1 and "RANK" in env and not launched


def unset(context: CheckContext) -> str:
    """The line that removes variables of a launcher that is not there."""
    names = [name for name in _STARTING if name in context.environ]
    return f"unset {' '.join(names)}" if names else "unset ${!SLURM_@} ${!OMPI_@} ${!PMI_@}"


def check_address(context: CheckContext) -> list[Finding]:
    """Whether the host of rank 0 is known here, and the other nodes can reach this one by its name."""
    place = context.place
    if place is None or (place.size == 1 and "MASTER_ADDR" not in context.environ):
        return []
    host = context.environ.get("MASTER_ADDR", place.master_addr)
    several_nodes = place.size > place.local_size
    if not addresses(host):
        fix = "export MASTER_ADDR=HOST   (name or address of the node of rank 0)"
        if "SLURM_JOB_NODELIST" in context.environ:
            fix = 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        elif not several_nodes:
            fix = "export MASTER_ADDR=127.0.0.1"
        return [problem("MASTER_ADDR", f"{host!r} cannot be resolved on {context.node}", fix)]
    findings = [ok("MASTER_ADDR", f"{host} resolves")]
    if several_nodes and "GLOO_SOCKET_IFNAME" not in context.environ:
        # Gloo gives other nodes the address of this host's name; with a loopback address they connect to themselves.
        name = socket.gethostname()
        own = addresses(name)
        if all(address.startswith("127.") or address == "::1" for address in own):
            found = f"{name} is {', '.join(own) or 'unknown'} to itself; other nodes cannot reach that"
            interfaces = ", ".join(name for _, name in socket.if_nameindex())
            findings.append(note("host name", found, f"export GLOO_SOCKET_IFNAME=NAME   (of: {interfaces})"))
    return findings


def addresses(host: str) -> list[str]:
    """Addresses of a host; none if its name cannot be resolved."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
