"""Files inside a tar archive on the web."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
import tempfile
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO

from hpc_oialr.data.sources import Source, SourceError

_PIECE = 1 << 20


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
    timeout_s
        Longest wait for an answer, in seconds.
    """

    url: str
    sha256: str
    members: tuple[str, ...]
    timeout_s: float = 30.0

    @property
    def title(self) -> str:
        """The address."""
        return f"archive {self.url}"

    def fill(self, folder: Path) -> None:
        """Download into a temporary file, check, take the members out."""
        with tempfile.TemporaryFile(dir=folder.parent) as archive:
            found = self._download(archive)
            if found != self.sha256:
                raise SourceError(f"the download is damaged: expected sha256 {self.sha256}, found {found}")
            archive.seek(0)
            self._take(archive, folder)

    def _download(self, archive: IO[bytes]) -> str:
        """The sha256 of what came."""
        digest = hashlib.sha256()
        try:
            with urllib.request.urlopen(self.url, timeout=self.timeout_s) as answer:
                while piece := answer.read(_PIECE):
                    digest.update(piece)
                    archive.write(piece)
        except HTTPException as error:
            raise SourceError(f"{self.url}: {error!r}") from error
        return digest.hexdigest()

    def _take(self, archive: IO[bytes], folder: Path) -> None:
        try:
            with tarfile.open(fileobj=archive) as opened:
                for member in self.members:
                    source = opened.extractfile(member)
                    if source is None:
                        raise SourceError(f"{member} is no file in {self.url}")
                    with (folder / Path(member).name).open("wb") as target:
                        shutil.copyfileobj(source, target)
        except (KeyError, tarfile.TarError, EOFError) as error:
            raise SourceError(f"{self.url} does not give {', '.join(self.members)}: {error}") from error
