from __future__ import annotations

import logging
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.small_disk import fill, small_disk
from support.tiny_runs import write_recipe

from hpc_oialr.cli.main import main
from hpc_oialr.data import cache_root
from hpc_oialr.errors import DataError
from hpc_oialr.outputs import new_file
from hpc_oialr.record.files import write_atomically
from hpc_oialr.system_errors import of_system, read_json
from hpc_oialr.train.process_settings import log_into


def one_error(capsys, *words):
    assert main([str(word) for word in words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("oialr: error: ")
    assert err.count("\n") == 1
    return err


def test_paths_that_cannot_be_used_are_told(capsys, tmp_path):
    recipe = write_recipe(tmp_path)
    file = tmp_path / "file"
    file.write_text("x")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "gone")
    undecodable = tmp_path / "recipe.yaml"
    undecodable.write_bytes(b"train: \xff\xfe")
    assert "Not a directory" in one_error(capsys, "train", recipe, "--out", file / "run")
    assert "File name too long" in one_error(capsys, "train", recipe, "--out", tmp_path / ("n" * 300))
    assert "recipe.yaml is no UTF-8 text (byte 7" in one_error(capsys, "train", undecodable)
    assert str(tmp_path) in one_error(capsys, "spectra", "show", dangling)
    assert "gone" in one_error(capsys, "spectra", "watch", tmp_path / "gone")
    assert "a\\nb holds no run" in one_error(capsys, "resume", "a\nb")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train: {}")
    assert "run holds a run" in one_error(capsys, "compare", recipe, "--out", tmp_path / "run")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert str(loop) in one_error(capsys, "data", "sample", "imagenet", loop)


def test_a_dangling_link_names_its_target(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError) as caught:
        link.read_text()
    assert f"{link} is a link to {tmp_path / 'gone'}, which does not exist" in str(of_system(caught.value))


def test_memory_is_told_and_bugs_are_not_hidden():
    assert "not enough memory" in str(of_system(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")))
    assert "not enough memory" in str(of_system(MemoryError()))
    assert of_system(RuntimeError("shapes do not match")) is None


def test_full_disk_has_a_fix():
    error = OSError(28, os.strerror(28), "/scratch/run/metrics.jsonl")
    assert str(of_system(error)) == (
        "/scratch/run/metrics.jsonl: No space left on device. Free some space, or take a folder on another file system."
    )


def test_a_disk_that_is_full_is_told_with_the_output(tmp_path, capsys):
    """Whoever writes: safetensors' error is no OSError, a copy's names its source, a stream's names nothing."""
    source = tmp_path / "source"
    source.write_bytes(b"x" * 20_000)
    with small_disk(tmp_path / "disk", 200) as disk:
        fill(disk, 0)
        for write in (
            lambda path: save_file({"a": torch.zeros(9_000)}, path),
            lambda path: shutil.copyfile(source, path),
            lambda path: write_atomically(path, "x" * 20_000),
            lambda path: path.write_text("x" * 20_000),
        ):
            with pytest.raises(OSError, match="No space left") as caught, new_file(disk / "out") as draft:
                write(draft)
            assert str(of_system(caught.value)).startswith(f"{disk}/")
        with log_into(disk / "process_0.log"):
            logging.getLogger("hpc_oialr").info("a" * 20_000)
    assert capsys.readouterr().err == ""


def test_damaged_json(tmp_path):
    (tmp_path / "summary.json").write_text('{"metric": 0.')
    with pytest.raises(DataError, match=r"summary.json is not valid JSON .*Copy it again, or remove it"):
        read_json(tmp_path / "summary.json")


def test_no_home(monkeypatch):
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(DataError, match="Set OIALR_DATA to a folder"):
        cache_root({})
