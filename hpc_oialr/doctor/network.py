"""How processes find and reach each other: the launcher's variables, address, port, interfaces."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from pathlib import Path

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
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_INTERFACES = Path("/sys/class/net")


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
            findings.append(note("host name", found, f"export GLOO_SOCKET_IFNAME={_likely_interface()}"))
    return findings


def check_port(context: CheckContext) -> list[Finding]:
    """Whether rank 0 can listen, and MASTER_PORT is not a port that the system gives to any program."""
    place, given = context.place, "MASTER_PORT" in context.environ
    # torchrun listens already.
    if place is None or "TORCHELASTIC_RUN_ID" in context.environ or (place.size == 1 and not given):
        return []
    low, high = ephemeral_range()
    fix = f"export MASTER_PORT=PORT   (one that is free on {context.node}, below {low})"
    if given:
        fix = "unset MASTER_PORT   (one is then derived from the job's number)"
        if low <= place.master_port <= high:
            found = (
                f"{place.master_port} lies in {low}-{high}, from which the system gives ports to any program"
            )
            return [problem("MASTER_PORT", found, fix)]
    if place.rank != 0:
        return [ok("MASTER_PORT", str(place.master_port))]
    free = [port for port in place.ports if not in_use(port)]
    if not free:
        found = f"{', '.join(map(str, place.ports))} is in use on {context.node}"
        return [problem("MASTER_PORT", found, fix)]
    return [ok("MASTER_PORT", f"{free[0]} is free")]


def ephemeral_range() -> tuple[int, int]:
    """First and last of the ports that the system hands out."""
    try:
        low, high = _EPHEMERAL.read_text().split()
    except (OSError, ValueError):
        return 32768, 60999
    return int(low), int(high)


def in_use(port: int) -> bool:
    """Whether this process cannot listen there."""
    with socket.socket() as probe:
        # As torch's own store does: a connection that has just ended does not matter.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except (OSError, OverflowError):
            return True
    return False


def check_interfaces(context: CheckContext) -> list[Finding]:
    """Whether the interfaces that NCCL and gloo are told to use exist."""
    there = interfaces()
    findings = []
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = context.environ.get(variable)
        if not value:
            continue
        wrong = missing_interfaces(value, there, exact=variable.startswith("GLOO"))
        if wrong:
            found = f"{value}: no interface {', '.join(wrong)} here; there are: {', '.join(there)}"
            findings.append(problem(variable, found, f"export {variable}={_likely_interface()}"))
        else:
            findings.append(ok(variable, f"{value}, among {', '.join(there)}"))
    return findings


def missing_interfaces(value: str, there: Sequence[str], *, exact: bool) -> list[str]:
    """Entries of a variable that match no interface.

    NCCL takes beginnings of names, exact names after ``=``, and with ``^`` those it shall not use (NCCL's
    user guide, NCCL_SOCKET_IFNAME); gloo takes exact names.

    >>> missing_interfaces("ib,eth1", ["lo", "eth0", "ib0"], exact=False)
    ['eth1']
    >>> missing_interfaces("ib", ["ib0"], exact=True), missing_interfaces("=ib", ["ib0"], exact=False)
    (['ib'], ['ib'])
    >>> missing_interfaces("^docker,lo", ["lo", "eth0"], exact=False)
    []
    """
    if value.startswith("^") and not exact:
        return []
    exact = exact or value.startswith("=")
    # NCCL ignores a port after a colon.
    names = [name.partition(":")[0] for name in value.removeprefix("=").split(",")]
    return [n for n in names if n not in there and (exact or not any(other.startswith(n) for other in there))]


def interfaces() -> list[str]:
    """Names of this host's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def _likely_interface() -> str:
    """The interface to use: InfiniBand before others that are up."""
    up = []
    for name in interfaces():
        with contextlib.suppress(OSError):
            if (_INTERFACES / name / "operstate").read_text() == "up\n":
                up.append(name)
    hosts_own = [name for name in up if not name.startswith(("lo", "docker", "veth", "br"))]
    return min(hosts_own, key=lambda name: not name.startswith("ib"), default="lo")


def addresses(host: str) -> list[str]:
    """Addresses of a host; none if its name cannot be resolved."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
