"""Images in tar shards: written once by ``oialr data pack``, or anyone's WebDataset; read in any order.

Why tar and not HDF5: ``docs/data.md``.
"""

from __future__ import annotations

import io
import os
import socket
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_oialr.data.base import ArrayDataset, Splits, fixed_order
from hpc_oialr.data.image_folder import EncodedImages, ImageConfig, require_pillow
from hpc_oialr.data.image_sources import (
    LABEL,
    ImageSource,
    StoredImages,
    Table,
    open_source,
    read_place,
)
from hpc_oialr.data.shard_files import INDEX, PARTS, OpenFiles, describe_file, read_index, verify_files, write_files
from hpc_oialr.data.unpacked import plain_tars
from hpc_oialr.errors import ConfigError, DataError

COMMAND = "oialr data pack"
PER_SHARD = 2500  # images: of ImageNet about 270 MiB


def pack(
    sources: Sequence[Path | str],
    folder: Path | str,
    *,
    per_shard: int = PER_SHARD,
    processes: int = 1,
    verify: bool = False,
) -> bool:
    """Write the images of ``sources`` into tar shards of ``folder``; whether all shards of all ranks are there.

    Each image keeps its bytes, as ``NNNNNNNNN.jpg`` beside its label, ``NNNNNNNNN.cls``, in a random order that is the
    same for every seed. Ranks of srun, mpirun, torchrun or submitit, and ``processes`` of each, share the work. After
    a kill the same call goes on with the shards that are missing. ``verify`` reads all shards again at the end.

    DataError if there are no images or a shard is damaged, OutputError if the folder holds something else.
    """
    if per_shard < 1:
        raise ConfigError("per_shard", per_shard, "must be at least 1 image")
    paths, target = [Path(source) for source in sources], Path(folder)
    plan: dict[str, Any] = {"command": COMMAND, "sources": [path.name for path in paths], "per_shard": per_shard}
    with plain_tars(paths, target, plan) as plain:
        done = plain is None
        if plain is not None:
            source = open_source(plain)
            writer = ShardWriter(source, per_shard)
            plan |= {"images": writer.images, "listing": source.listing()}
            done = write_files(target, writer, plan, processes=processes)
    if done and verify:
        verify_files(target, read_index(target, COMMAND), processes=processes)
    return done


class ShardWriter:
    """Tar shards of all parts of a source, each a function of its number."""

    def __init__(self, source: ImageSource, per_shard: int) -> None:
        self.source, self.per_shard = source, per_shard
        self.images = {part: len(source.labels(part)) for part in PARTS if len(source.labels(part))}
        self.shards = [(part, first) for part, n in self.images.items() for first in range(0, n, per_shard)]
        self.names = [f"{part}-{first // per_shard:06d}.tar" for part, first in self.shards]

    def write(self, number: int, path: Path) -> dict[str, Any]:
        """One shard; its places, relative to it, are written beside it."""
        part, first = self.shards[number]
        labels = self.source.labels(part)
        order = fixed_order(len(labels))[first : first + self.per_shard].tolist()
        rows = []
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for key, index in enumerate(order, first):
                suffix, content = self.source.read(part, index)
                if not content:
                    raise DataError(f"image {index} of {part} in the source is empty; get it again, or remove it.")
                offset = _add(archive, f"{key:09d}.{suffix}", content)
                _add(archive, f"{key:09d}.cls", str(labels[index]).encode())
                rows.append((0, offset, len(content), labels[index], zlib.crc32(content)))
        places = np.array(rows, np.int64)
        return {"part": part, "images": len(rows), "places": [column.tolist() for column in places.T[1:]]}

    def index(self, folder: Path, files: list[dict[str, Any]]) -> dict[str, Any]:
        """Joins the places into a table for each part."""
        tables = {}
        for part in self.images:
            own = [note for note in files if note["part"] == part]
            table = np.concatenate(
                [np.array([[i] * note["images"], *note["places"]], np.int64).T for i, note in enumerate(own)]
            )
            # Two ranks may write it at once, each under a name of its own.
            path = folder / f".{part}-{os.getpid()}-{socket.gethostname()}.npy"
            with path.open("wb") as file:
                np.save(file, table)
            tables[part] = {**describe_file(path), "name": f"{part}.npy"}
            path.replace(folder / f"{part}.npy")
        for note in files:
            del note["places"]
        return {"classes": list(self.source.classes), "tables": tables}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> int:
    """Add a file of no date and owner, so that shards have the same bytes whoever writes them; where its bytes begin."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))
    return archive.offset - (len(content) + -len(content) % tarfile.BLOCKSIZE)


class StoredFiles(EncodedImages):
    """Images within files, by a table of places."""

    def __init__(self, files: OpenFiles, table: Table, config: ImageConfig, *, training: bool) -> None:
        super().__init__(torch.from_numpy(np.array(table[:, LABEL])), config, training=training)
        self.files, self.table = files, table

    def encoded(self, index: int) -> tuple[BinaryIO, str]:
        """The bytes of a sample; a SampleError names a damaged shard."""
        place: NDArray[np.int64] = self.table[index]
        name = f"{self.files.paths[int(place[0])]}, image at byte {int(place[1])},"
        return io.BytesIO(read_place(self.files, place)), name


@dataclass(frozen=True, kw_only=True)
class ImageShards(ImageConfig):
    """Images that ``oialr data pack`` packed, or in uncompressed WebDataset tars, read in any order.

    WebDataset tars hold for each image a file of its suffix and one of the same name with ``.cls``, the number of its
    label; their names say train, val or test. They are listed anew at every start; packed ones have an index, and
    every image read is compared with its checksum. Without a ``val`` part evaluations use ``test``. Further
    parameters: see :class:`ImageConfig`.

    Parameters
    ----------
    path
        The folder of the shards.
    """

    def _load(self) -> Splits:
        require_pillow()
        if self.path is None:
            raise ConfigError("data.path", None, "must name a folder of shards", fix=f"Make one by {COMMAND}.")
        folder = Path(self.path)
        if not folder.is_dir():
            raise DataError(f"image shards {folder} do not exist. Make them by {COMMAND}.")
        packed = (folder / INDEX).exists() or (folder / ".plan.json").exists()
        parts, classes = (_packed if packed else _listed)(folder)

        def part(name: str) -> ArrayDataset | None:
            return StoredFiles(*parts[name], self, training=name == "train") if name in parts else None

        train = part("train")
        assert train is not None
        if self.limit is not None:
            train = train.subset(fixed_order(len(train)))
        return Splits(train, part("val"), part("test"), classes=classes)


Parts = dict[str, tuple[OpenFiles, Table]]


def _packed(folder: Path) -> tuple[Parts, int]:
    index = read_index(folder, COMMAND)
    parts: Parts = {}
    for part, note in index["tables"].items():
        verify_files(folder, {"command": COMMAND, "files": [note]})
        table = np.load(folder / note["name"], mmap_mode="r", allow_pickle=False)
        files = [folder / note["name"] for note in index["files"] if note["part"] == part]
        if missing := [path for path in files if not path.is_file()]:
            raise DataError(f"{missing[0]} is missing ({len(missing)} of {len(files)} shards of {part}).")
        parts[part] = OpenFiles(files), table
    return parts, len(index["classes"])


def _listed(folder: Path) -> tuple[Parts, int]:
    for file in folder.iterdir():
        if file.name.endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")):
            raise DataError(f"{file} is compressed and cannot be read in any order. Pack the folder: {COMMAND}")
    source = open_source([folder])
    if not isinstance(source, StoredImages):
        raise DataError(f"{folder} holds folders of files, no shards. Choose ImageFolder, or pack it: {COMMAND}")
    return {part: (source.files, table) for part, table in source.tables.items()}, len(source.classes)
