"""Energy by hardware counters: which are read, by whom, and what is said when one cannot be."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hpc_oialr.record.energy import EnergyMeter

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


class Packages:
    """RAPL's files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def set(self, package: int, joules: float) -> None:
        folder = self.folder / f"intel-rapl:{package}"
        folder.mkdir(exist_ok=True)
        (folder / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
        (folder / "max_energy_range_uj").write_text("100000000\n")


@pytest.fixture
def packages(tmp_path: Path) -> Packages:
    packages = Packages(tmp_path)
    for package in (0, 1):
        packages.set(package, 50)
    part = tmp_path / "intel-rapl:0:0"
    part.mkdir()
    (part / "energy_uj").write_text("999\n")
    return packages


def test_processors(packages: Packages) -> None:
    meter = EnergyMeter(CPU, first_of_node=True, powercap=packages.folder)
    packages.set(0, 60)
    assert meter.since_last() == pytest.approx(10)
    packages.set(0, 99)
    packages.set(1, 5)
    assert meter.since_last() == pytest.approx(39 + 55), "the second has begun anew after 100 J"
    assert meter.since_last() == 0


def test_others_of_the_node_count_nothing_twice(packages: Packages) -> None:
    meter = EnergyMeter(CPU, first_of_node=False, powercap=packages.folder)
    packages.set(0, 60)
    assert meter.since_last() == 0


def test_nothing_to_read(tmp_path: Path) -> None:
    assert math.isnan(EnergyMeter(CPU, first_of_node=True, powercap=tmp_path / "none").since_last())


def test_a_package_that_may_not_be_read(packages: Packages) -> None:
    """Half of a node's energy is no energy."""
    (packages.folder / "intel-rapl:1" / "energy_uj").write_text("")
    assert math.isnan(EnergyMeter(CPU, first_of_node=True, powercap=packages.folder).since_last())


def test_a_counter_that_goes_away(packages: Packages) -> None:
    meter = EnergyMeter(CPU, first_of_node=True, powercap=packages.folder)
    (packages.folder / "intel-rapl:1" / "energy_uj").unlink()
    assert math.isnan(meter.since_last())
    packages.set(1, 70)
    assert math.isnan(meter.since_last()), "what was missed is not known"


class NVMLError(Exception):
    """As pynvml's."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A library that counts millijoules of one GPU."""
    state = SimpleNamespace(millijoules=1000, asked=[], broken=False)

    def energy(handle: str) -> int:
        if state.broken:
            raise NVMLError("GPU is lost")
        assert handle == "handle"
        return int(state.millijoules)

    library = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: state.asked.append(uuid) or "handle",
        nvmlDeviceGetTotalEnergyConsumption=energy,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid-of-{device.index}")
    )
    return state


def test_a_gpu_with_and_without_its_node(packages: Packages, nvml: SimpleNamespace, tmp_path: Path) -> None:
    both = EnergyMeter(GPU, first_of_node=True, powercap=packages.folder)
    gpu = EnergyMeter(GPU, first_of_node=True, powercap=tmp_path / "none")
    nvml.millijoules = 4000
    packages.set(0, 60)
    assert both.since_last() == pytest.approx(13)
    assert gpu.since_last() == pytest.approx(3)
    assert set(nvml.asked) == {"GPU-uuid-of-1"}


def test_a_gpu_that_is_lost(nvml: SimpleNamespace, tmp_path: Path) -> None:
    meter = EnergyMeter(GPU, first_of_node=False, powercap=tmp_path)
    nvml.broken = True
    assert math.isnan(meter.since_last())


def test_a_gpu_without_nvml(
    packages: Packages, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with caplog.at_level(logging.INFO):
        meter = EnergyMeter(GPU, first_of_node=True, powercap=packages.folder)
    assert math.isnan(meter.since_last()), "processors alone would be too little"
    assert "pip install 'hpc_oialr[energy]'" in caplog.text
