"""The README's code runs, its commands exist, and its numbers are those of the committed result files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from benchmarks.pages.claims import claims, missing
from hpc_oialr.cli.main import make_parser
from hpc_oialr.distributed import World
from hpc_oialr.errors import OIALRError
from hpc_oialr.method.rules import RankRule
from hpc_oialr.spectra.files import write_record
from hpc_oialr.spectra.schema import EVENT, KINDS, STEP, LayerRows
from hpc_oialr.train import run
from hpc_oialr.train.load_config import load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_folder_it_names_exists(page: Path) -> None:
    """As a path from the root or from the package; names in capitals stand for any, and a run makes folders too."""
    text = page.read_text()
    named = re.findall(r"(?<![\w/.<*])[\w/]+\.(?:py|sh)\b", text) + re.findall(r"`([\w/]+/)`", text)
    named += re.findall(r"benchmarks/[\w/]+\.\w+", text) + re.findall(r"\]\(([\w/]+\.\w+)", text)
    bases = (ROOT, ROOT / "hpc_oialr", page.parent)
    missing = {
        path
        for path in named
        if not any((base / path).exists() for base in bases)
        and "NAME" not in path
        and path not in ("checkpoints/", "logs/", "profile/", "train.py")  # the last is timm's script
    }
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_is_in_the_file_it_is_said_to_be_in(page: Path) -> None:
    """For `NAME` (`FILE`), `NAME` in `FILE` and `NAME` of `FILE`."""
    said = re.findall(r"`([\w.]+)`,? (?:\(|in |of )`([\w/]+\.py)`", page.read_text())
    assert said or page.name not in ("architecture.md", "CONTRIBUTING.md")
    for name, path in said:
        (file,) = (base / path for base in (ROOT, ROOT / "hpc_oialr") if (base / path).exists())
        word = name.rpartition(".")[2]
        assert re.search(rf"\b{word}\b", file.read_text()), (name, path)


def test_every_rule_is_in_the_docs() -> None:
    rules = [rule.__name__ for rule in RankRule.__subclasses__() if rule.__module__ == RankRule.__module__]
    for page in ("guide.md", "method.md"):
        text = (ROOT / "docs" / page).read_text()
        assert [rule for rule in rules if f"`{rule}" not in text] == [], page


def test_the_layout_of_spectra_is_that_of_the_schema(tmp_path: Path) -> None:
    """Fields with their types, kinds, and all attributes of a file."""
    text = (ROOT / "docs/guide.md").read_text().partition("### What the HDF5 file holds\n")[2]
    fields = re.findall(r"^\| `(\w+)` \| (\w+) \|", text, re.MULTILINE)
    schema = [(name, str(table[name])) for table in (EVENT, STEP) for name in table.names or ()]
    assert fields == schema
    assert ", ".join(f"{number} {kind}" for kind, number in KINDS.items()) in text
    rows = LayerRows("a", 0, 2, 3, np.zeros(1, EVENT), np.zeros((1, 2), np.float32))
    world = World.single("cpu")
    attributes = run._attributes(load_config("fashion_mnist_vit"), world)
    write_record(tmp_path / "spectra.h5", attributes, [rows])
    with h5py.File(tmp_path / "spectra.h5") as file:
        group = file["layers/a"]
        names = [*file.attrs, *group.attrs, *group]
        assert str(file.attrs["schema_version"]) in text
    prose = text.partition("| field |")[0]
    assert [name for name in names if f"`{name}`" not in prose and f"`{name} =" not in prose] == []


def test_a_figure_in_a_sentence_that_is_not_the_result_files_is_named() -> None:
    page = (ROOT / "docs" / "method.md").read_text()
    assert missing("docs/method.md", page) == []
    claim = next(text for where, text in claims() if where == "docs/method.md" and "dense Muon" in text)
    assert missing("docs/method.md", " ".join(page.split()).replace(claim, claim.replace(".", ".9"))) == [claim]
