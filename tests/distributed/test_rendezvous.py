from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import replace
from datetime import timedelta

import pytest
from support.spawn import free_port

from hpc_oialr.distributed.environment import LaunchInfo, launch_info
from hpc_oialr.distributed.rendezvous import rendezvous_store
from hpc_oialr.errors import WorldError

LIMIT = timedelta(seconds=20)


def info_of(rank: int, *ports: int, token: str = "7.0") -> LaunchInfo:
    return LaunchInfo(rank, 2, rank, 2, "slurm", "127.0.0.1", ports[0], ports[1:], token)


@contextlib.contextmanager
def listener(answer: bytes | None):
    """A foreign program: says nothing (None), or writes and hangs up."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        kept = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    kept.append(connection)
                    if answer is not None:
                        connection.sendall(answer)
                        connection.close()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.close()
        for connection in kept:
            connection.close()


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH\r\n", None])
def test_a_foreign_listener_is_passed_by(answer, monkeypatch):
    monkeypatch.setattr("hpc_oialr.distributed.rendezvous._ANSWER_S", 1.0)
    with listener(answer) as taken:
        ports = (taken, free_port())
        first = rendezvous_store(info_of(0, *ports), LIMIT)
        second = rendezvous_store(info_of(1, *ports), LIMIT)
        first.set("sum", "3")
        assert second.get("sum") == b"3"


def test_another_run_at_the_same_port_is_passed_by(monkeypatch):
    monkeypatch.setattr("hpc_oialr.distributed.rendezvous._ANSWER_S", 1.0)
    shared, spare = free_port(), free_port()
    other = rendezvous_store(replace(info_of(0, shared), token="805.0"), LIMIT)
    mine = info_of(1, shared, spare)
    # Process 0 of this run came later: the port was taken, so it listens at the next one.
    first = rendezvous_store(info_of(0, spare), LIMIT)
    second = rendezvous_store(mine, LIMIT)
    first.set("who", "7.0")
    assert second.get("who") == b"7.0"
    del other


def test_nobody_there_ends_within_the_limit():
    with pytest.raises(OSError, match=r"nobody of this run answers at the ports \(\d+,\)"):
        rendezvous_store(info_of(1, free_port()), timedelta(seconds=1))


def test_ports_and_tokens_of_jobs():
    step = {
        "SLURM_JOB_ID": "41",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_TASKS_PER_NODE": "1(x2)",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    here, later = launch_info(step), launch_info(step | {"SLURM_JOB_ID": str(41 + 798)})
    assert len(set(here.ports)) == 4
    assert all(20_000 <= port < 32_768 for port in here.ports)
    assert here.master_port == later.master_port
    assert here.token != later.token
    assert launch_info(step | {"MASTER_PORT": "12345"}).ports == (12345,)


def test_first_node_of_a_host_file(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("b2\na1\nb2\n")
    step = {
        "SLURM_JOB_ID": "41",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": "3",
        "SLURM_TASKS_PER_NODE": "1,2",
        "SLURM_JOB_NODELIST": "a1,b2",
        "SLURM_DISTRIBUTION": "arbitrary",
    }
    assert launch_info(step | {"SLURM_HOSTFILE": str(hosts)}).master_addr == "b2"
    assert launch_info(step | {"MASTER_ADDR": "a1"}).master_addr == "a1"
    with pytest.raises(WorldError, match="Set MASTER_ADDR to that node"):
        launch_info(step)
