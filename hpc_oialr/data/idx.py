"""The IDX format of the MNIST family: a header of big-endian sizes, then raw bytes, gzipped."""

from __future__ import annotations

import gzip
import hashlib
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
        data = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name} does not unpack: {error}.") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != _UINT8 or data[3] == 0:
        raise DataError(f"{name} is no IDX file of unsigned bytes: it begins with {data[:4].hex()!r}.")
    begin = 4 + 4 * data[3]
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, begin, 4))
    if len(data) - begin != math.prod(shape):
        raise DataError(f"{name} does not hold the {math.prod(shape)} bytes its header {shape} promises.")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=begin).view(shape)
