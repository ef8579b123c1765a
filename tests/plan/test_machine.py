"""Networks of several nodes, devices, presets, and calibrations."""

from __future__ import annotations

import json

import pytest

from hpc_oialr.engines import DDP, FSDP, TensorParallel
from hpc_oialr.errors import DataError, UnknownNameError
from hpc_oialr.plan import presets
from hpc_oialr.plan.calibration import machine_at_hand
from hpc_oialr.plan.collectives import Link, seconds
from hpc_oialr.plan.device import BANDWIDTH_EFFICIENCY, Device, Work
from hpc_oialr.plan.network import Network, Placement
from hpc_oialr.plan.places import Place, data_processes, misfit, placement
from hpc_oialr.plan.recorder import Message

NETWORK = Network(
    name="n",
    origin="preset",
    source="s",
    inside=Link(1e-6, 1e-11),
    between=Link(1e-5, 1e-10),
    adapters=2,
    start_s=1e-6,
)


def test_an_all_reduce_over_nodes():
    """Reduce-scatter inside, all-reduce of each part between, all-gather inside; four share two adapters."""
    where, n = Placement(nodes=8, per_node=4), 1e8
    inside = 2 * seconds("all_gather", NETWORK.inside, 4, n)
    between = seconds("all_reduce", Link(1e-5, 2e-10), 8, n / 4)
    assert NETWORK.seconds("all_reduce", n, where) == pytest.approx(1e-6 + inside + between)


def test_groups_that_share_adapters_take_longer():
    alone = NETWORK.seconds("all_reduce", 1e8, Placement(8, 1))
    shared = NETWORK.seconds("all_reduce", 1e8, Placement(8, 1, groups=4))
    assert shared == pytest.approx(4 * alone, rel=0.02)


@pytest.mark.parametrize("collective", ["all_gather", "reduce_scatter", "broadcast", "all_to_all"])
def test_one_node_is_one_node(collective):
    expected = 1e-6 + seconds(collective, NETWORK.inside, 4, 1e6)
    assert NETWORK.seconds(collective, 1e6, Placement(1, 4)) == pytest.approx(expected)
    assert NETWORK.seconds(collective, 1e6, Placement(1, 1)) == 0.0


def cpu(**over):
    settings = {
        "name": "c", "origin": "measured", "source": "s", "memory_gib": 16.0, "peak": {"float32": 1e11, "bfloat16": 4e11},
        "efficiency": 0.5, "bandwidth": 1e10, "launch_s": 1e-5, "svd_flops": 1e10, "inside": Link(0, 0), "cores": 2,
        "sharing": {2: 1.1, 4: 2.3},
    }  # fmt: skip
    return Device(**settings | over)


def test_roofline():
    work = Work({"float32": 1e11, "bfloat16": 4e11}, moved=1e10, operations=10)
    busy = (1 + 1) / 0.5 + 1 / BANDWIDTH_EFFICIENCY
    assert cpu().seconds(work) == pytest.approx(busy)
    assert cpu().seconds(Work({}, 0.0, 1e6)) == pytest.approx(10.0), "launches"


def test_processes_share_cores():
    """Half the cores at 2, and what was measured on top; beyond the last measurement in proportion."""
    device, work = cpu(), Work({"float32": 1e11}, 0.0, 1)
    assert [device.threads(p) for p in (1, 2, 4)] == [2, 1, 1]
    assert [device.slowdown(p) for p in (1, 2, 4, 8)] == pytest.approx([1.0, 1.1, 2.3, 4.6])
    assert device.seconds(work, 2) == pytest.approx(2 * 1.1 * device.seconds(work, 1))
    assert [device.memory_of_process_gib(p) for p in (1, 4)] == [16.0, 4.0]
    gpu = presets.gpu("a100-40")
    assert (gpu.slowdown(4), gpu.memory_of_process_gib(4)) == (1.0, gpu.memory_gib)


def test_presets_by_name():
    site = presets.site("juwels-booster")
    assert (site.gpu, site.gpus_per_node, site.adapters) == ("a100-40", 4, 4)
    network = presets.network("ndr", presets.gpu("h100"), adapters=4)
    assert network.between.gb_per_s == pytest.approx(50 * presets.LINK_EFFICIENCY)
    with pytest.raises(UnknownNameError, match="unknown GPU 'a100'; valid: a100-40, a100-80, h100, mi250x"):
        presets.gpu("a100")
    with pytest.raises(UnknownNameError, match="unknown network 'ib'; valid: hdr200, ndr, slingshot11"):
        presets.network("ib", presets.gpu("h100"), adapters=1)
    with pytest.raises(UnknownNameError, match="unknown site 'lumy'; .*Did you mean 'lumi'"):
        presets.site("lumy")


def test_every_site_has_presets():
    for site in presets.SITES.values():
        network = presets.network(site.network, presets.gpu(site.gpu), adapters=site.adapters)
        assert network.adapters == site.adapters


def calibration():
    fit = {"backend": "gloo", "collective": "all_reduce", "alpha_s": 1e-4, "beta_s_per_byte": 1e-9}
    device = {"cores": 2, "memory_gib": 8.0, "peak": {"float32": 1e11}, "bandwidth": 1e10, "svd_flops": 1e10}
    others = (
        {**fit, "processes": 4, "alpha_s": 3e-4},
        {**fit, "backend": "mpi", "processes": 2, "alpha_s": 9.0},
    )
    fits = [{**fit, "processes": 2}, *others]
    return {"rows": [], "backend": "gloo", "fits": fits, "sharing": {"1": 1.0, "4": 2.5}, "device": device}


def test_a_calibration_is_read(tmp_path):
    path = tmp_path / "comm.json"
    path.write_text(json.dumps(calibration()))
    machine = machine_at_hand(path)
    assert (machine.network.origin, machine.network.name) == ("measured", "gloo")
    assert machine.device.slowdown(4) == 2.5
    assert machine.network.seconds("all_reduce", 0, Placement(1, 2)) == pytest.approx(2e-4)
    assert machine.network.seconds("all_reduce", 0, Placement(1, 16)) == pytest.approx(30 * 3e-4), (
        "the nearest fit"
    )


@pytest.mark.parametrize("content", ["", "{}", None])
def test_another_file_is_no_calibration(tmp_path, content):
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(
        DataError, match=r"other.json is no result of python -m benchmarks.comm \(.*Make one: python -m"
    ):
        machine_at_hand(path)


def test_where_members_of_groups_are():
    place = Place(nodes=4, per_node=8, batch=1)
    assert placement(Message("all_reduce", 1, 32), place) == Placement(4, 8)
    assert placement(Message("all_reduce", 1, 4), place) == Placement(1, 4, groups=2), "neighbours"
    assert placement(Message("all_reduce", 1, 8, stride=4), place) == Placement(4, 2, groups=4)
    assert placement(Message("all_reduce", 1, 2, stride=16), place) == Placement(2, 1, groups=8)
    assert placement(Message("all_reduce", 1, 16), place) == Placement(2, 8, groups=1)


def test_what_cannot_be():
    how = {"global_batch": 16, "accumulation": 1, "optimizer": "AdamW"}
    assert misfit(DDP(), 16, **how) is None
    assert misfit(DDP(), 12, **how) == "16 samples cannot be dealt to 12 processes; 12 can, or take --weak"
    assert misfit(FSDP(), 32, **how) == "16 samples cannot be dealt to 32 processes; 32 can, or take --weak"
    assert misfit(TensorParallel(size=4), 6, **how) == "TensorParallel needs a multiple of 4 processes"
    assert misfit(TensorParallel(size=4), 64, **how) is None
    assert data_processes(TensorParallel(size=4), 64) == 16
