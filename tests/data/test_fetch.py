from __future__ import annotations

import hashlib
import logging
import os
import sys
import zipfile
from collections.abc import Collection
from pathlib import Path

import pytest

from hpc_oialr.data.fetch import FetchableDataset, describe, fetch, fetch_into
from hpc_oialr.data.sources import (
    Source,
    SourceError,
    debian_package,
    local_folder,
    mirror,
    pypi_wheel,
    run_program,
)
from hpc_oialr.errors import DataError, OIALRError, UnknownNameError

CONTENT = b"date,value\n"
SHA = hashlib.sha256(CONTENT).hexdigest()


def fake(content: bytes | None = CONTENT) -> Source:
    def fill(folder: Path, names: Collection[str]) -> None:
        if content is None:
            raise SourceError("nothing today")
        (folder / "a.csv").write_bytes(content)

    return Source("fake", fill)


def dataset(*sources: Source) -> FetchableDataset:
    return FetchableDataset("toy", {"a.csv": (SHA,)}, sources)


def test_sources_are_tried_in_turn_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    target = fetch_into(dataset(fake(None), fake(b"other"), fake()), tmp_path / "cache")
    assert target == tmp_path / "cache" / "toy"
    assert (target / "a.csv").read_bytes() == CONTENT
    assert [path.name for path in target.parent.iterdir()] == ["toy"]
    assert caplog.messages[:2] == ["toy: trying fake", "toy: fake: nothing today"]
    assert "a.csv is damaged: expected sha256" in caplog.messages[3]
    assert caplog.messages[-1] == f"toy: fetched from fake into {target}, checked"


def test_second_time_no_source_is_asked(tmp_path: Path) -> None:
    fetch_into(dataset(fake()), tmp_path)
    assert fetch_into(dataset(), tmp_path) == tmp_path / "toy"


def test_damaged_copy_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = tmp_path / "toy" / "a.csv"
    bad.parent.mkdir()
    bad.write_bytes(b"dust")
    fetch_into(dataset(fake()), tmp_path)
    assert bad.read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    assert "a.csv is damaged" in caplog.messages[0]


def test_all_failed_lists_what_was_tried(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        fetch_into(dataset(fake(None), local_folder("/nowhere")), tmp_path)
    message = str(caught.value)
    assert f"toy could not be fetched into {tmp_path / 'toy'}. Tried fake: nothing today; " in message
    assert "folder /nowhere: [Errno 2] No such file or directory" in message
    assert "Run `oialr data fetch toy` where there is internet (on a cluster: the login node)" in message
    assert "--data.data_dir or set OIALR_DATA" in message
    assert list(tmp_path.iterdir()) == []


def test_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot write to .*file: .* Name another folder, or set OIALR_DATA"):
        fetch_into(dataset(fake()), tmp_path / "file")


def test_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(UnknownNameError) as caught:
        fetch("fashion_mnist")
    assert str(caught.value) == (
        "unknown data set 'fashion_mnist'; valid: cifar-10, etth1, etth2, ettm1, ettm2, fashion-mnist, m4-hourly, "
        "minilm, python-docs, taylor-30-min. "
        "Did you mean 'fashion-mnist'?"
    )


def test_files_that_lie_in_data_dir_are_used(tmp_path: Path) -> None:
    toy = describe("taylor-30-min")
    assert toy.fault(tmp_path) == f"{tmp_path / 'taylor_30_min.csv'} is missing"
    content = Path("/usr/share/datasets/fashion-mnist")
    if describe("fashion-mnist").fault(content) is not None:
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    assert fetch("fashion-mnist", content) == content


def test_data_set_without_checksums_must_not_be_empty(tmp_path: Path) -> None:
    docs = describe("python-docs")
    assert docs.fault(tmp_path) == f"{tmp_path} holds no files"
    (tmp_path / "a.rst.txt").write_text("text")
    assert docs.fault(tmp_path) is None


def test_mirror(tmp_path: Path) -> None:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "a.csv").write_bytes(CONTENT)
    (tmp_path / "new").mkdir()
    source = mirror((tmp_path / "web").as_uri())
    source.fill(tmp_path / "new", ("a.csv",))
    assert (tmp_path / "new" / "a.csv").read_bytes() == CONTENT
    with pytest.raises(OSError, match="urlopen error"):
        source.fill(tmp_path / "new", ("b.csv",))


def programs(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Put shell scripts first on the PATH; ``apt_get`` stands for ``apt-get``."""
    folder.mkdir()
    for name, script in scripts.items():
        file = folder / name.replace("_", "-")
        file.write_text(f"#!/bin/sh\n{script}\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


DPKG = "mkdir -p unpacked/usr/x/sub && echo doc > unpacked/usr/x/sub/a.txt && echo no > unpacked/usr/x/b.html"


@pytest.mark.parametrize(
    "apt",
    [
        "touch p.deb",
        # Without package lists only the second way, with lists of our own, delivers.
        'case "$*" in *lists*update) touch updated;; *lists*download*) test -f updated && touch p.deb;; '
        "*) echo E: no lists >&2; exit 100;; esac",
    ],
)
def test_debian_package_is_unpacked_without_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apt: str) -> None:
    programs(tmp_path / "bin", monkeypatch, apt_get=apt, dpkg=DPKG)
    (tmp_path / "new").mkdir()
    debian_package("p", "usr/x", "*.txt").fill(tmp_path / "new", ())
    files = [file.relative_to(tmp_path / "new") for file in (tmp_path / "new").rglob("*") if file.is_file()]
    assert files == [Path("sub/a.txt")]


def test_debian_package_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs(tmp_path / "bin", monkeypatch, apt_get="echo first >&2; echo E: no such package >&2; exit 100")
    with pytest.raises(SourceError, match=r"^apt-get failed with exit code 100: E: no such package$"):
        debian_package("p", "usr/x", "*.txt").fill(tmp_path, ())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SourceError, match=r"^apt-get is not installed$"):
        debian_package("p", "usr/x", "*.txt").fill(tmp_path, ())


def test_pypi_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "toy-1-py3-none-any.whl", "w") as archive:
        archive.writestr("toy/data/a.csv", CONTENT)
    pip = f'cp {tmp_path}/*.whl "$PWD"; case "$*" in *"pip"*download*toy==1) ;; *) exit 9;; esac'
    programs(tmp_path / "bin", monkeypatch, python=pip)
    monkeypatch.setattr(sys, "executable", "python")
    (tmp_path / "new").mkdir()
    pypi_wheel("toy==1", "toy/data").fill(tmp_path / "new", ("a.csv",))
    assert (tmp_path / "new" / "a.csv").read_bytes() == CONTENT
    with pytest.raises(SourceError, match=r"toy-1-py3-none-any\.whl does not give b\.csv"):
        pypi_wheel("toy==1", "toy/data").fill(tmp_path / "new", ("b.csv",))


def test_program_that_hangs_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"^sleep took longer than 0\.1 s$"):
        run_program(["sleep", "10"], cwd=tmp_path, timeout_s=0.1)


def test_other_files_stay_and_damaged_ones_of_the_user_too(tmp_path: Path) -> None:
    folder = tmp_path / "toy"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "a.csv").write_bytes(b"mine too")
    with pytest.raises(OIALRError, match=r"a\.csv exists already, and fetching toy would write over it"):
        fetch_into(dataset(fake()), tmp_path, replace=False)
    assert (folder / "a.csv").read_bytes() == b"mine too"
    fetch_into(dataset(fake()), tmp_path)
    assert (folder / "a.csv").read_bytes() == CONTENT
    assert (folder / "notes.txt").read_text() == "mine"
