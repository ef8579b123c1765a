"""Stale variables, hosts that are not there."""

from __future__ import annotations

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


def test_one_process(context):
    who = context()
    assert [finding.state for finding in network.check_launcher(who)] == ["ok"]
    assert not network.check_address(who)


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
    assert name.fix.startswith("export GLOO_SOCKET_IFNAME=NAME   (of: lo")
    assert len(network.check_address(context(STEP | {"GLOO_SOCKET_IFNAME": "lo"}))) == 1
