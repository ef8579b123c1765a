"""The README, followed by somebody who has the wheel only: built from the sdist, installed, used in an empty folder."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
from pathlib import Path

import pytest
from test_readme import ROOT, blocks, commands

# Runs in the new environment: prints the exit code of every command, without starting anything.
TRY_COMMANDS = """
import contextlib, io, json, shlex, sys
import hpc_oialr
assert "site-packages" in hpc_oialr.__file__, hpc_oialr.__file__
from hpc_oialr.cli.main import main
ends = {}
for command in json.load(sys.stdin):
    words = shlex.split(command[command.index("oialr ") :])[1:]
    if words[0] == "train":
        words.append("--print_config")
    elif words[0] == "submit":
        words.append("--dry-run")
    elif words[0] not in ("recipes", "info"):
        words.append("--help")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(words)
        except SystemExit as left:
            code = left.code
    ends[command] = [code or 0, said.getvalue()]
print(json.dumps(ends))
"""


def _run(*command: object, cwd: Path, variables: dict[str, str] | None = None, **options) -> str:
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")} | (variables or {})
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environ, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An environment with the wheel, and what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "checkout", ignore=ignored)
    build = "import sys; from setuptools import build_meta as b; b.build_{0}(sys.argv[1])"
    _run(sys.executable, "-c", build.format("sdist"), folder, cwd=folder / "checkout")
    (sdist,) = folder.glob("hpc_oialr-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "source", filter="data")
    (source,) = (folder / "source").iterdir()
    assert {"slurm", "tests", "benchmarks", "env", "README.md"} <= {each.name for each in source.iterdir()}
    _run(sys.executable, "-c", build.format("wheel"), folder, cwd=source)
    (wheel,) = folder.glob("*.whl")

    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    _run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=folder,
    )
    # The dependencies of this environment; .pth files there, as of an editable install, do not count.
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    return python


@pytest.fixture
def on_login_node(tmp_path) -> dict[str, str]:
    """Variables with which sbatch is one that takes everything and repeats it."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\necho "$@"\n')
    sbatch.chmod(0o755)
    return {"PATH": f"{sbatch.parent}:{os.environ['PATH']}"}


@pytest.mark.slow
def test_every_command_of_the_readme(python, tmp_path, on_login_node):
    wanted = [command for command in commands() if "oialr " in command and not command.startswith("make")]
    said = _run(python, "-c", TRY_COMMANDS, cwd=tmp_path, variables=on_login_node, input=json.dumps(wanted))
    ends = json.loads(said.splitlines()[-1])
    assert len(ends) >= 15
    assert not {command: said for command, (code, said) in ends.items() if code}
    (submitted,) = (said for command, (_, said) in ends.items() if " submit " in command)
    assert "launch/sites/horeka.sh" in submitted


@pytest.mark.slow
def test_the_readmes_loop(python, tmp_path):
    (code,) = (block for block in blocks("python") if "torch" in block)
    assert "'0':" in _run(python, "-c", code, cwd=tmp_path)


@pytest.mark.slow
def test_batch_scripts_find_the_installed_package(python, tmp_path, on_login_node):
    """Here they come as far as sbatch, with the options of the site."""
    _run(python.with_name("oialr"), "recipes", "--scripts", ".", cwd=tmp_path)
    assert (tmp_path / "slurm" / "vit_b16.sh").read_text() == (ROOT / "slurm" / "vit_b16.sh").read_text()
    variables = {**on_login_node, "OIALR_VENV": str(python.parents[1]), "SITE": "horeka"}
    said = _run("bash", "slurm/vit_b16.sh", "--nodes=4", cwd=tmp_path, variables=variables)
    assert "--partition=accelerated --gres=gpu:4 --nodes=4" in said
