"""Packages that are missing or too old."""

from __future__ import annotations

import importlib.metadata
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from hpc_oialr.doctor import packages


@pytest.fixture
def installed(monkeypatch):
    """Pretends that packages have other versions, or are missing (None); all others are there."""
    real = metadata.version

    def pretend(**versions: str | None) -> None:
        def version(name: str) -> str:
            if name in versions:
                found = versions[name]
                if found is None:
                    raise metadata.PackageNotFoundError(name)
                return found
            try:
                return real(name)
            except metadata.PackageNotFoundError:
                return "9999"

        monkeypatch.setattr(metadata, "version", version)

    return pretend


def test_all_is_there(context, installed):
    installed()
    (found,) = packages.check_packages(context())
    assert (found.name, found.state) == ("packages", "ok")


def required_torch() -> str:
    """As the installed package says."""
    requirements = (Requirement(text) for text in importlib.metadata.requires("hpc_oialr") or ())
    return next(str(each.specifier) for each in requirements if each.name == "torch" and each.marker is None)


def test_an_old_torch(context, installed):
    installed(torch="2.1.0")
    (found,) = packages.check_packages(context())
    assert (found.state, found.found) == ("problem", f"torch is 2.1.0; must be {required_torch()}")
    assert found.fix == 'pip install --upgrade "hpc_oialr"'


def test_missing_submitit_where_there_is_slurm(context, installed, programs):
    installed(submitit=None)
    programs.put_cluster()
    _, found = packages.check_packages(context())
    assert (found.name, found.state) == ("submitit", "problem")
    assert found.found == "missing: oialr submit cannot submit jobs"
    assert found.fix == 'pip install "hpc_oialr[slurm]"'


def test_missing_extras_on_a_laptop_are_one_note(context, installed):
    installed(submitit=None, mpi4py=None)
    _, found = packages.check_packages(context())
    assert (found.name, found.state, found.found) == (
        "extras",
        "note",
        "not installed: mpi, slurm; runs do without",
    )
    assert found.fix == 'pip install "hpc_oialr[mpi,slurm]"'


def test_an_old_submitit(context, installed):
    installed(submitit="1.4.0")
    _, found = packages.check_packages(context())
    assert (found.name, found.state, found.found) == (
        "[slurm]",
        "problem",
        "submitit is 1.4.0; must be >=1.5.2",
    )
    assert found.fix == 'pip install --upgrade "hpc_oialr[slurm]"'
