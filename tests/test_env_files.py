"""Lock files that hold what setup.cfg asks for; files that name each other exist."""

from __future__ import annotations

import configparser
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ENV = ROOT / "env"
EXTRAS = "all"


def locked(name: str) -> dict[str, str]:
    """Version of every package of a lock file."""
    lines = (ENV / f"requirements-{name}.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and line[0] not in "#-")
    return dict(pairs)


def asked_for() -> Iterator[Requirement]:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    names = re.search(r"\[(.*)\]", extras[EXTRAS])[1].split(",")
    for text in [setup["options"]["install_requires"], *(extras[name] for name in names)]:
        yield from (Requirement(line) for line in text.splitlines() if line and not line.startswith("hpc_oialr"))


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_locks_satisfy_setup_cfg(name):
    versions = locked(name)
    for requirement in asked_for():
        version = versions[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), requirement


def test_both_locks_are_of_the_same_versions():
    cpu, cuda = locked("cpu"), locked("cuda")
    differing = {name for name in cpu if cpu[name].partition("+")[0] != cuda[name]}
    assert differing == set()
    more = {name for name in cuda if name not in cpu}
    assert all(re.match(r"nvidia-|cuda-|triton", name) for name in more)
    assert cpu["torch"].endswith("+cpu")


def test_files_that_others_name_exist():
    conda = yaml.safe_load((ENV / "environment.yml").read_text())
    (file,) = conda["dependencies"][-1]["pip"]
    assert (ENV / file.split()[-1]).exists()
    definition = (ENV / "hpc_oialr.def").read_text()
    assert (ROOT / re.search(r"requirements=(\S+)", definition)[1]).exists()
    copied = re.search(r"%files\n(.*?)\n\n", definition, re.DOTALL)[1]
    sources = [word for line in copied.splitlines()[1:] for word in line.split()[:-1]]
    assert sources
    assert all((ROOT / source).exists() for source in sources)


def test_versions_stand_in_one_place():
    """The package's in hpc_oialr/__init__.py, ruff's in setup.cfg; other files repeat them."""
    version = re.search(r'__version__ = "(.*)"', (ROOT / "hpc_oialr/__init__.py").read_text())[1]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    ruff = next(repo["rev"] for repo in hooks if "ruff" in repo["repo"])
    assert f"ruff=={ruff.removeprefix('v')}\n" in (ROOT / "setup.cfg").read_text()
