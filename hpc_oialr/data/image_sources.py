"""Images that can be read by number: folders of files, tars of these, WebDataset tars, CIFAR-10's binary files.

All but the first are tables of places in files, read by one system call an image; nothing is unpacked.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from hpc_oialr.data.image_folder import SUFFIXES, class_names, list_images, require_pillow
from hpc_oialr.data.shard_files import PARTS, OpenFiles, digest
from hpc_oialr.errors import DataError, SampleError

ALIASES = {"validation": "val", "valid": "val", "training": "train"}
# A record of CIFAR-10's binary files: a label and 32 x 32 pixels of 3 colours.
RECORD = 1 + 3 * 32 * 32
CIFAR10_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)  # fmt: skip
FORMS = "part/CLASS/image files, tars of these, WebDataset tars of images and .cls, or CIFAR-10's binary files"
# Place of an image: file, first byte, bytes, label, and the CRC-32 of the bytes or -1.
Table = NDArray[np.int64]
FILE, OFFSET, SIZE, LABEL, CRC = range(5)


class ImageSource(ABC):
    """Encoded images in parts "train", "val", "test" with labels."""

    classes: Sequence[str]

    @abstractmethod
    def labels(self, part: str) -> NDArray[np.int64]:
        """Of all images of a part; empty if the source has no such part."""

    @abstractmethod
    def read(self, part: str, index: int) -> tuple[str, bytes]:
        """Suffix, e.g. "jpg", and content of an image."""

    @abstractmethod
    def listing(self) -> str:
        """A digest of names and labels, not of contents."""


class FolderSource(ImageSource):
    """``train/CLASS/*.jpg``, and ``val`` and ``test`` where they exist."""

    def __init__(self, root: Path) -> None:
        self.root, self.classes = root, class_names(root / "train")
        self._listed = {part: list_images(root / part, [*self.classes]) for part in PARTS if (root / part).is_dir()}

    def labels(self, part: str) -> NDArray[np.int64]:
        """Of all images of a part."""
        return self._listed[part][1].numpy() if part in self._listed else np.empty(0, np.int64)

    def read(self, part: str, index: int) -> tuple[str, bytes]:
        """Suffix and content of a file."""
        path = self.root / part / os.fsdecode(bytes(self._listed[part][0][index]))
        try:
            return path.suffix[1:].lower(), path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}.") from error

    def listing(self) -> str:
        """A digest of all names."""
        names = (names.tobytes() for names, _ in self._listed.values())
        return digest([*(os.fsencode(name) for name in self.classes), *names])


class StoredImages(ImageSource):
    """Images within files, by a table for each part."""

    def __init__(self, paths: Sequence[Path], tables: dict[str, Table], suffixes: dict[str, list[str]],
                 classes: Sequence[str]) -> None:  # fmt: skip
        self.files, self.tables, self.classes = OpenFiles(paths), tables, classes
        self._suffixes = suffixes

    def labels(self, part: str) -> NDArray[np.int64]:
        """Of all images of a part."""
        return self.tables[part][:, LABEL] if part in self.tables else np.empty(0, np.int64)

    def read(self, part: str, index: int) -> tuple[str, bytes]:
        """Suffix and content; a record of CIFAR-10's binary files as PNG, which loses nothing."""
        content, suffix = read_place(self.files, self.tables[part][index]), self._suffixes[part][index]
        return ("png", _record_as_png(content)) if suffix == "bin" else (suffix, content)

    def listing(self) -> str:
        """A digest of places and labels."""
        names = (path.name.encode() for path in self.files.paths)
        return digest([*(name.encode() for name in self.classes), *names, *(t.tobytes() for t in self.tables.values())])


def read_place(files: OpenFiles, place: NDArray[np.int64]) -> bytes:
    """The bytes of a row of a table; SampleError names the file if they are not those that were written."""
    file, offset, size, label, crc = place.tolist()
    content = files.read(file, offset, size)
    if crc >= 0 and zlib.crc32(content) != crc:
        where = f"the image at byte {offset}, of label {label}, has another checksum"
        raise SampleError(f"{files.paths[file]} is damaged: {where}. Find all damage: oialr data verify FOLDER")
    return content


def open_source(paths: Sequence[Path]) -> ImageSource:
    """The images in a folder, or in tar archives or folders of these; DataError if there are none."""
    if len(paths) == 1 and (paths[0] / "train").is_dir():
        return FolderSource(paths[0])
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    stored = [file for file in files if file.suffix in (".tar", ".bin") and file.is_file() and file.name[0] != "."]
    found: list[_Member] = []
    for number, file in enumerate(stored):
        found += (
            _members_of_tar(file, number) if file.suffix == ".tar" else _records(file, number, 0, file.stat().st_size)
        )
    if not found:
        raise DataError(f"{', '.join(map(str, paths))}: there are no images here. Wanted: {FORMS}.")
    return _as_table(stored, found)


@dataclass(frozen=True)
class _Member:
    part: str
    label: str  # name of its class, or its number
    suffix: str
    file: int
    offset: int
    size: int


def _members_of_tar(path: Path, number: int) -> Iterable[_Member]:
    """Images of one tar, in its order."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    records: list[_Member] = []
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if not member.isfile():
                    continue
                # WebDataset: the key ends at the first dot of the last component.
                key = str(name.parent / name.name.partition(".")[0])
                if name.suffix == ".cls":
                    content = archive.extractfile(member)
                    assert content is not None
                    labels[key] = int(content.read())
                elif name.suffix.lower() in SUFFIXES:
                    images[member.name] = member
                elif _is_cifar(name.name):
                    records += _records(Path(name.name), number, member.offset_data, member.size, path)
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{path} is not a tar archive, or a damaged one: {error}.") from error
    for full, member in images.items():
        name = PurePosixPath(full)
        suffix = name.suffix[1:].lower()
        if labels:
            key = str(name.parent / name.name.partition(".")[0])
            if key not in labels:
                raise DataError(f"{path} has {full} but no {key}.cls with its label.")
            part, label = _part_of(path.name, path), str(labels[key])
        else:
            if len(name.parts) < 2:
                raise DataError(f"{path} has {full}, which lies in no folder of a class. Wanted: {FORMS}.")
            part = name.parts[-3] if len(name.parts) > 2 else ""
            part = ALIASES.get(part, part)
            part, label = part if part in PARTS else _part_of(path.name, path), name.parts[-2]
        records.append(_Member(part, label, suffix, number, member.offset_data, member.size))
    return records


def _part_of(name: str, path: Path) -> str:
    found = re.search(r"(?<![a-z])(train|training|val|valid|validation|test)(?![a-z])", name.lower())
    if found is None:
        raise DataError(f"{path} does not say which part it is: put train, val or test into its name.")
    return ALIASES.get(found[1], found[1])


def _is_cifar(name: str) -> bool:
    return re.fullmatch(r"(data_batch_\d+|test_batch)\.bin", name) is not None


def _records(path: Path, number: int, start: int, size: int, archive: Path | None = None) -> list[_Member]:
    """Records of one of CIFAR-10's binary files, which may lie in a tar from ``start`` on."""
    if not _is_cifar(path.name):
        return []
    where = archive or path
    if not size or size % RECORD:
        raise DataError(f"{where}: {path.name} has {size} bytes, not a multiple of {RECORD}, the size of a record.")
    labels = np.memmap(where, np.uint8, "r", start, (size // RECORD, RECORD))[:, 0]
    if (label := int(labels.max())) >= len(CIFAR10_CLASSES):
        raise DataError(f"{where}: {path.name} has label {label}, but CIFAR-10 has 0 to 9.")
    part = "test" if path.name.startswith("test") else "train"
    places = range(start, start + size, RECORD)
    return [
        _Member(part, CIFAR10_CLASSES[label], "bin", number, offset, RECORD)
        for label, offset in zip(labels.tolist(), places, strict=True)
    ]


def _as_table(paths: Sequence[Path], found: Sequence[_Member]) -> StoredImages:
    names = {member.label for member in found}
    numbers = all(name.isdigit() and name == str(int(name)) for name in names)
    # Numbers of WebDataset's labels are labels already, also where one does not occur.
    classes = [str(i) for i in range(max(map(int, names)) + 1)] if numbers else sorted(names)
    if all(member.suffix == "bin" for member in found):
        classes = list(CIFAR10_CLASSES)
    position = {name: i for i, name in enumerate(classes)}
    tables, suffixes = {}, {}
    for part in PARTS:
        members = [member for member in found if member.part == part]
        if members:
            rows = [(m.file, m.offset, m.size, position[m.label], -1) for m in members]
            tables[part], suffixes[part] = np.array(rows, np.int64), [m.suffix for m in members]
    if "train" not in tables:
        raise DataError(f"{', '.join(map(str, paths))}: there are images of {', '.join(tables)}, but none to train on.")
    return StoredImages(paths, tables, suffixes, classes)


def _record_as_png(record: bytes) -> bytes:
    require_pillow()
    from PIL import Image

    pixels = np.frombuffer(record, np.uint8, offset=1).reshape(3, 32, 32).transpose(1, 2, 0)
    target = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(target, "PNG")
    return target.getvalue()
