"""No command deletes or overwrites what it did not write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.made_runs import make_run
from support.tiny_runs import write_recipe

from hpc_oialr.cli.main import main
from hpc_oialr.compare import compare
from hpc_oialr.errors import OIALRError
from hpc_oialr.outputs import MARKER, OutputError, claim, marked, new_folder
from hpc_oialr.train.load_config import load_config

TEXT = marked("a text", b"text", mark=b"by us")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run")
    (folder / "checkpoints").mkdir()
    torch.save({"a.weight": torch.eye(9)}, folder / "checkpoints" / "step_1.pt")
    return folder


def words_of(verb: str, run: Path, out: Path) -> list[str]:
    checkpoint = str(run / "checkpoints" / "step_1.pt")
    first = {
        "report": ["report", str(run)],
        "plot": ["spectra", "plot", str(run)],
        "analyze": ["analyze", checkpoint, "--device", "cpu"],
        "repair": ["spectra", "repair", str(run)],
        "export": ["spectra", "export", str(run)],
    }[verb]
    return [*first, "--out", str(out)]


@pytest.mark.parametrize(
    ("verb", "name"), [("report", "a.html"), ("plot", "a.svg"), ("analyze", "a.h5"), ("repair", "b.h5")]
)
def test_files_of_others_and_inputs_stay(verb, name, run, tmp_path, capsys):
    there = tmp_path / name
    there.write_bytes(b"precious")
    before = contents(tmp_path)
    assert main(words_of(verb, run, there)) == 2
    assert f"{there} exists and is not a" in capsys.readouterr().err
    of_run = run / "checkpoints" / "step_1.pt"
    link = tmp_path / f"link{there.suffix}"
    link.hardlink_to(of_run)
    before[link.name] = of_run.read_bytes()
    for out in (link, of_run.parent) if verb != "plot" else (link,):
        assert main([*words_of(verb, run, out), "--force"]) == 2
        error = capsys.readouterr().err
        assert "which is read here" in error or "is a folder, and the output is one file" in error
    assert contents(tmp_path) == before
    assert main([*words_of(verb, run, there), "--force"]) == 0
    written = there.read_bytes()
    assert written != b"precious"
    # Its own earlier output needs no --force.
    assert main(words_of(verb, run, there)) == 0
    assert contents(tmp_path) == {**before, name: there.read_bytes()}


def test_a_folder_of_others_stays(run, tmp_path, capsys):
    home = tmp_path / "home"
    home.mkdir()
    (home / "events.csv").write_text("mine")
    (home / "letters").mkdir()
    (home / "letters" / "a.txt").write_text("mine too")
    before = contents(tmp_path)
    for out in (home, run, run / "checkpoints"):
        assert main(words_of("export", run, out)) == 2
        assert str(out) in capsys.readouterr().err
    assert main([*words_of("export", run, run / "checkpoints"), "--force"]) == 2
    assert contents(tmp_path) == before
    assert main([*words_of("export", run, home), "--force"]) == 0
    assert (home / "letters" / "a.txt").read_text() == "mine too"
    assert (home / "events.csv").read_text().startswith("layer,")


def test_a_folder_is_ones_own_as_long_as_nobody_has_changed_it(tmp_path):
    def fill(out: Path, *names: str, force: bool = False) -> None:
        with new_folder(out, "test", force=force) as folder:
            for name in names:
                (folder / name).write_text(name)

    out = tmp_path / "out"
    fill(out, "a", "b")
    fill(out, "b", "c")
    assert sorted(path.name for path in out.iterdir()) == ["b", "c", MARKER]
    (out / "b").write_text("fine-tuned since")
    with pytest.raises(OutputError, match=r"holds what test did not write: b\. Name a new folder"):
        fill(out, "b", "c")
    assert (out / "b").read_text() == "fine-tuned since"
    fill(out, "c", force=True)
    assert (out / "b").read_text() == "fine-tuned since"
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, and the output is a folder"):
        fill(tmp_path / "file", "a")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "never", "test"):
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_links_and_devices(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    own.write_bytes(b"text by us")
    other.write_bytes(b"text by others")
    (tmp_path / "link").symlink_to(own)
    assert claim(tmp_path / "link", TEXT) == own.resolve()
    (tmp_path / "dangling").symlink_to(tmp_path / "new")
    assert claim(tmp_path / "dangling", TEXT) == (tmp_path / "new").resolve()
    (tmp_path / "hard").hardlink_to(own)
    with pytest.raises(OutputError, match=r"hard is .*own, which is read here"):
        claim(tmp_path / "hard", TEXT, inputs=[own], force=True)
    with pytest.raises(OutputError, match=r"replace this one: --force"):
        claim(other, TEXT)
    with pytest.raises(OutputError, match="is no regular file but a device or a pipe"):
        claim("/dev/null", TEXT, force=True)


def test_a_run_and_a_comparison_begin_in_folders_of_their_own(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    work = tmp_path / "work"
    work.mkdir()
    (work / "environment.json").write_text("mine")
    assert main(["train", str(recipe), "--out", str(work)]) == 2
    assert "environment.json exists already, and a run would write over it" in capsys.readouterr().err
    assert main(["submit", str(recipe), "--executor", "local", "--out", str(work)]) == 2
    assert "environment.json exists already" in capsys.readouterr().err
    (work / "dense.yaml").write_text("mine")
    with pytest.raises(OIALRError, match=r"dense\.yaml exists already, and this comparison would write over it"):
        compare(load_config(recipe), work, own=False)
    assert contents(work) == {"environment.json": b"mine", "dense.yaml": b"mine"}
    assert sorted(path.name for path in work.iterdir()) == ["dense.yaml", "environment.json"]
