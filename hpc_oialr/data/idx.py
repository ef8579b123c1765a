"""The IDX format of the MNIST family: a header of big-endian sizes, then raw bytes, gzipped."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from hpc_oialr.errors import DataError

_UINT8 = 0x08


def verified_bytes(path: Path, accepted: Collection[str], *, fix: str) -> bytes:
    """Content of a file whose sha256 is one of ``accepted``.

    Raises
    ------
    DataError
        The file cannot be read, or is damaged; names file, expected and found checksum, and ``fix``.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. {fix}") from error
    found = hashlib.sha256(content).hexdigest()
    if found not in accepted:
        expected = " or ".join(accepted)
        raise DataError(f"{path} is damaged: expected sha256 {expected}, found {found}. {fix}")
    return content


def parse_idx(content: bytes, name: str) -> Tensor:
    """Unpack gzipped IDX bytes into a uint8 tensor of the shape in its header.

    Parameters
    ----------
    content
        The .gz file.
    name
        What to call it in an error.

    Raises
    ------
    DataError
        Not gzip, not IDX of unsigned bytes, or of another length than its header says.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            shape = _read_header(stream, name)
            array = torch.empty(shape, dtype=torch.uint8)
            got = _read_into(stream, array)
            surplus = len(stream.read(1))
    except DataError:  # An OSError too, but it says already what is wrong.
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} does not unpack: {error}.") from error
    if got != array.numel() or surplus:
        raise DataError(f"{name} does not hold the {math.prod(shape)} bytes its header {shape} promises.")
    return array


def _read_header(stream: gzip.GzipFile, name: str) -> tuple[int, ...]:
    magic = stream.read(4)
    if len(magic) != 4 or magic[:2] != b"\0\0" or magic[2] != _UINT8 or magic[3] == 0:
        raise DataError(f"{name} is no IDX file of unsigned bytes: it begins with {magic.hex()!r}.")
    sizes = stream.read(4 * magic[3])
    return tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, len(sizes), 4))


def _read_into(stream: gzip.GzipFile, array: Tensor) -> int:
    """Fill the tensor without a second copy in memory; returns the bytes that came."""
    flat, done = array.flatten().numpy(), 0
    while done < len(flat) and (count := stream.readinto(flat[done:].data)):
        done += count
    return done
