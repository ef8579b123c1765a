from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import pytest

from hpc_oialr.data.fetch import FetchableDataset, fetch_into
from hpc_oialr.data.sources import Source, SourceError, tar_archive
from hpc_oialr.errors import DataError


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "data.tar.gz"
    with tarfile.open(path, "w:gz") as opened:
        for name in ("folder/a.bin", "folder/b.bin", "../evil.bin"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            opened.addfile(entry, io.BytesIO(name[-5:-1].encode()))
        entry = tarfile.TarInfo("folder/sub")
        entry.type = tarfile.DIRTYPE
        opened.addfile(entry)
    return path


def source(archive: Path, sha256: str | None = None) -> Source:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    return tar_archive(archive.as_uri(), sha256 or found, "folder")


def test_named_members_are_taken_out_and_nothing_else(archive: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    source(archive).fill(folder, ("b.bin",))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"b.bin": b"b.bi"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.tar.gz", "new"]


def test_what_is_wrong_is_said(archive: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    with pytest.raises(SourceError, match=r"the download is damaged: expected sha256 0000, found [0-9a-f]{64}"):
        source(archive, sha256="0000").fill(folder, ("a.bin",))
    with pytest.raises(SourceError, match=r"does not give c\.bin: .*not found"):
        source(archive).fill(folder, ("c.bin",))
    with pytest.raises(SourceError, match=r"folder/sub is not a file in file:"):
        source(archive).fill(folder, ("sub",))
    archive.write_bytes(archive.read_bytes()[:60])
    with pytest.raises(SourceError, match=r"does not give a\.bin"):
        source(archive).fill(folder, ("a.bin",))
    assert list(folder.iterdir()) == []
    with pytest.raises(OSError, match="urlopen error"):
        tar_archive((tmp_path / "none").as_uri(), "", "folder").fill(folder, ())


def test_a_fetched_archive_is_checked_by_the_sizes_of_its_files(archive: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    toy = FetchableDataset("toy", {"a.bin": 4}, (source(archive),))
    assert fetch_into(toy, root) == root / "toy"
    (root / "toy" / "a.bin").write_bytes(b"abc")
    assert toy.fault(root / "toy") == f"{root / 'toy' / 'a.bin'} is damaged: expected 4 bytes, found 3"
    fetch_into(toy, root)
    assert (root / "toy" / "a.bin").read_bytes() == b"a.bi"
    with pytest.raises(DataError, match=r"a\.bin is damaged: expected 5 bytes, found 4\. Run `oialr data fetch"):
        fetch_into(FetchableDataset("other", {"a.bin": 5}, (source(archive),)), root)
