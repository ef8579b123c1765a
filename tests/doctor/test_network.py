"""Stale variables, hosts that are not there, ports in use, interfaces by wrong names."""

from __future__ import annotations

import socket

import pytest
from support.slurm_step import step

from hpc_oialr.doctor import network

TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29123",
}
STEP = step(per_node="2(x2)", SLURM_JOB_NODELIST="localhost,no-such-node.invalid")


@pytest.fixture
def taken_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.fixture
def wide_range(monkeypatch, tmp_path):
    """A system that hands out no port that a test may have been given."""
    (tmp_path / "range").write_text("65534 65535\n")
    monkeypatch.setattr(network, "_EPHEMERAL", tmp_path / "range")


def test_one_process(context):
    who = context()
    assert [finding.state for finding in network.check_launcher(who)] == ["ok"]
    assert not network.check_address(who) + network.check_port(who) + network.check_interfaces(who)


@pytest.mark.parametrize(
    ("environ", "found", "fix"),
    [
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE is 8 but RANK is not set", "unset WORLD_SIZE"),
        (STEP | {"RANK": "0", "WORLD_SIZE": "1"}, "srun started 4 tasks", "unset RANK WORLD_SIZE"),
        (STEP | {"SLURM_NODEID": "5"}, "seen from node 5", "unset ${!SLURM_@} ${!OMPI_@} ${!PMI_@}"),
    ],
)
def test_stale_variables(context, environ, found, fix):
    (finding,) = network.check_launcher(context(environ))
    assert (finding.name, finding.state, finding.fix) == ("launcher", "problem", fix)
    assert found in finding.found


def test_rank_that_no_launcher_has_set(context):
    (finding,) = network.check_launcher(context(TORCHRUN))
    assert finding.state == "note"
    assert "by RANK and WORLD_SIZE alone: no torchrun, srun or mpirun" in finding.found
    assert finding.fix == "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    launched = network.check_launcher(context(TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}))
    assert [finding.state for finding in launched] == ["ok"]


def test_an_address_that_does_not_resolve(context):
    (finding,) = network.check_address(context({"MASTER_ADDR": "no-such-host.invalid"}))
    assert (finding.name, finding.state) == ("MASTER_ADDR", "problem")
    assert finding.found.startswith("'no-such-host.invalid' cannot be resolved on ")
    assert finding.fix == "export MASTER_ADDR=127.0.0.1"
    (finding,) = network.check_address(context(STEP | {"MASTER_ADDR": "no-such-host.invalid"}))
    assert finding.fix == 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'


def test_a_host_that_is_loopback_to_itself(context, monkeypatch):
    monkeypatch.setattr(network, "addresses", lambda host: ["127.0.1.1"])
    address, name = network.check_address(context(STEP))
    assert (address.state, name.name, name.state) == ("ok", "host name", "note")
    assert "127.0.1.1 to itself" in name.found
    assert name.fix.startswith("export GLOO_SOCKET_IFNAME=")
    assert len(network.check_address(context(STEP | {"GLOO_SOCKET_IFNAME": "lo"}))) == 1


def test_a_port_in_use(context, taken_port, wide_range):
    who = context({"MASTER_PORT": str(taken_port), "SLURMD_NODENAME": "node1"})
    (finding,) = network.check_port(who)
    assert (finding.name, finding.state) == ("MASTER_PORT", "problem")
    assert finding.found == f"{taken_port} is in use on node1"
    assert finding.fix.startswith("unset MASTER_PORT")
    (other,) = network.check_port(context(TORCHRUN | {"MASTER_PORT": str(taken_port), "RANK": "1"}))
    assert other.state == "ok", "only rank 0 listens"


def test_ports_of_the_project_in_use(context, monkeypatch):
    """Runs take the next of their own ports, so only all of them together are a problem."""
    first, *spare = context(STEP).place.ports
    monkeypatch.setattr(network, "in_use", lambda port: port == first)
    (finding,) = network.check_port(context(STEP))
    assert (finding.state, finding.found) == ("ok", f"{spare[0]} is free")
    monkeypatch.setattr(network, "in_use", lambda port: True)
    (finding,) = network.check_port(context(STEP | {"SLURMD_NODENAME": "node1"}))
    assert finding.state == "problem"
    assert finding.found.startswith(f"{first}, {spare[0]}, ")
    assert finding.fix.startswith("export MASTER_PORT=PORT   (one that is free on node1")


def test_a_port_that_the_system_hands_out(context):
    low, high = network.ephemeral_range()
    (finding,) = network.check_port(context({"MASTER_PORT": str(low + 1)}))
    assert finding.state == "problem"
    assert (
        finding.found == f"{low + 1} lies in {low}-{high}, from which the system gives ports to any program"
    )
    assert finding.fix.startswith("unset MASTER_PORT")


def test_torchrun_listens_itself(context, taken_port):
    environ = TORCHRUN | {"MASTER_PORT": str(taken_port), "TORCHELASTIC_RUN_ID": "none"}
    assert not network.check_port(context(environ))


def test_interfaces_by_wrong_names(context):
    environ = {"NCCL_SOCKET_IFNAME": "ib7,lo", "GLOO_SOCKET_IFNAME": "l"}
    nccl, gloo = network.check_interfaces(context(environ))
    assert (nccl.name, nccl.state) == ("NCCL_SOCKET_IFNAME", "problem")
    assert nccl.found.startswith("ib7,lo: no interface ib7 here; there are: ")
    assert nccl.fix.startswith("export NCCL_SOCKET_IFNAME=")
    assert (gloo.name, gloo.state) == ("GLOO_SOCKET_IFNAME", "problem"), "gloo takes whole names"
    good = {"NCCL_SOCKET_IFNAME": "l", "GLOO_SOCKET_IFNAME": "lo"}
    assert [finding.state for finding in network.check_interfaces(context(good))] == ["ok", "ok"]


def test_the_interface_to_use(monkeypatch, tmp_path):
    states = {"lo": "unknown", "docker0": "up", "eth0": "up", "ib0": "down", "ib1": "up"}
    for name, state in states.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "operstate").write_text(f"{state}\n")
    monkeypatch.setattr(network, "_INTERFACES", tmp_path)
    monkeypatch.setattr(network, "interfaces", lambda: [*states, "gone0"])
    assert network._likely_interface() == "ib1"
