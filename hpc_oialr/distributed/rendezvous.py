"""Rendezvous of a run's ranks; ports on which another program or run listens are skipped."""

from __future__ import annotations

import socket
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from hpc_oialr.distributed.environment import LaunchInfo

_ANSWER_S = 10.0  # torch's store answers at once; another program may never do
_PAUSE_S = 0.1
_TOKEN = "run"


def rendezvous_store(info: LaunchInfo, timeout: timedelta) -> Store:
    """The store through which ranks find each other, with keys that no earlier group has used.

    Rank 0 listens at the first of ``info.ports`` that no other program or job uses; the others ask each port whether it
    belongs to this run. OSError or RuntimeError if there is no store of this run within ``timeout``.

    A store may outlive its group (torchrun keeps one), and a second group of the same ranks would find the addresses of
    the first one in it and hang: hence the prefix.
    """
    if info.launcher == "torchrun":
        # torchrun's agent may own the store. An IPv6 address needs brackets in a URL.
        host = f"[{info.master_addr}]" if ":" in info.master_addr else info.master_addr
        url = f"tcp://{host}:{info.ports[0]}"
        store: Store = next(rendezvous(url, info.rank, info.size, timeout=timeout))[0]
    else:
        store = _listen(info, timeout) if info.rank == 0 else _connect(info, timeout)
    store.set_timeout(timeout)
    return PrefixStore(f"group {store.add(f'groups of process {info.rank}', 1)}", store)


def _listen(info: LaunchInfo, timeout: timedelta) -> Store:
    failure: Exception | None = None
    for port in info.ports:
        try:
            store = _store(info, port, timeout)
        except RuntimeError as error:
            failure = error
            continue
        store.set(_TOKEN, info.token)
        return store
    raise OSError(f"none of the ports {info.ports} can be listened at: {failure}")


def _connect(info: LaunchInfo, timeout: timedelta) -> Store:
    deadline = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < deadline:
        for port in info.ports:
            store = _of_this_run(info, port, deadline)
            if store is not None:
                return store
        time.sleep(_PAUSE_S)
    raise OSError(f"nobody of this run answers at the ports {info.ports}")


def _of_this_run(info: LaunchInfo, port: int, deadline: float) -> Store | None:
    """The store at a port if rank 0 of this run has made it."""
    try:
        socket.create_connection((info.master_addr, port), timeout=_ANSWER_S).close()
    except OSError:
        return None
    found: list[Store] = []

    def connect() -> None:
        try:
            store = _store(info, port, timedelta(seconds=_ANSWER_S))
            if store.get(_TOKEN).decode() == info.token:
                found.append(store)
        except (RuntimeError, ValueError):
            return

    # A listener that accepts and never answers would block this rank.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(max(0.0, min(_ANSWER_S + 1, deadline - time.monotonic())))
    return found[0] if found else None


def _store(info: LaunchInfo, port: int, timeout: timedelta) -> TCPStore:
    is_master = info.rank == 0
    options = {"wait_for_workers": False, "multi_tenant": True}
    return TCPStore(info.master_addr, port, info.size, is_master, timeout, **options)
