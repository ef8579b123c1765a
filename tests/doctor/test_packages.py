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


@pytest.mark.parametrize(
    ("version", "found"),
    [(None, "submitit is missing: oialr"), ("1.4.0", "submitit is 1.4.0; must be >=1.5.2: oialr")],
)
def test_submitit_where_there_is_slurm(context, installed, programs, version, found):
    installed(submitit=version)
    assert len(packages.check_packages(context())) == 1, "no Slurm, no submission"
    programs.put_cluster()
    _, submitit = packages.check_packages(context())
    assert (submitit.name, submitit.state) == ("submitit", "problem")
    assert submitit.found == f"{found} submit cannot submit jobs"
    assert submitit.fix == 'pip install --upgrade "hpc_oialr[slurm]"'
