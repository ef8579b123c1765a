"""The README's code runs, its commands exist, and its numbers are those of the committed result files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_oialr.cli.main import make_parser
from hpc_oialr.errors import OIALRError
from hpc_oialr.train.load_config import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = (block for block in blocks("python") if "torch" in block)
    exec(compile(code, "README.md", "exec"), {})
    assert "'0':" in capsys.readouterr().out


def test_python_submits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The call is accepted as it stands; only its script is made."""
    pytest.importorskip("submitit")
    from hpc_oialr import launch

    scripts: list[object] = []
    real = launch.submit
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "submit", lambda *a, **k: scripts.append(real(*a, **k, dry_run=True)))
    (code,) = (block for block in blocks("python") if "submit" in block)
    exec(compile(code, "README.md", "exec"), {})
    assert "--nodes=4" in str(scripts[0])


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("command", [c for c in commands() if "oialr " in c])
def test_commands_are_understood(command: str) -> None:
    """Every option of each `oialr` command exists, and so does every setting, with a value it may have."""
    words = shlex.split(command[command.index("oialr ") :])[1:]
    arguments, settings = make_parser().parse_known_args(words)
    if not getattr(arguments, "takes_settings", False):
        assert not settings
    elif "recipe" in arguments:
        load_config(arguments.recipe, settings)


def test_an_unknown_option_would_be_seen() -> None:
    with pytest.raises(AssertionError):
        test_commands_are_understood("oialr spectra show runs/NAME --no-such-option")
    with pytest.raises(OIALRError):
        test_commands_are_understood("oialr train fashion_mnist_vit --train.epochz 1")


@pytest.mark.parametrize("target", [c.split()[1] for c in commands() if c.startswith("make ")])
def test_make_targets_exist(target: str) -> None:
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_numbers_are_those_of_the_result_files() -> None:
    checked = subprocess.run([sys.executable, "-m", "benchmarks.readme", "--check"], cwd=ROOT, check=False)
    assert checked.returncode == 0, "run python -m benchmarks.readme"


def test_every_file_it_names_exists() -> None:
    for path in re.findall(r"`((?:hpc_oialr|benchmarks|slurm|env)/[\w/]+\.\w+)`", README):
        assert (ROOT / path).exists(), path
    assert (ROOT / "benchmarks/results/demo.png").exists()
