"""A byte-level corpus from a folder of text files: vocabulary 256, no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpc_oialr.data.base import (
    ArrayDataset,
    Batch,
    CounterRNG,
    DataConfig,
    OnDevice,
    Splits,
    check_fractions,
    fixed_order,
)
from hpc_oialr.data.fetch import cache_root, describe
from hpc_oialr.errors import ConfigError, DataError

# Ends each document; does not occur in text.
SEPARATOR = b"\0"


class ByteSequences(ArrayDataset):
    """Consecutive sequences of a corpus (uint8 [bytes]), without overlap; a remainder at the end is dropped."""

    movable = ("sequences",)

    def __init__(self, corpus: Tensor, sequence_length: int) -> None:
        self.num_bytes = len(corpus)
        count = self.num_bytes // sequence_length
        self.sequences = corpus[: count * sequence_length].view(count, sequence_length)

    def __len__(self) -> int:
        return len(self.sequences)

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """``{"input_ids": int64 [B, T], "labels": int64 [B, T]}``, equal: the model shifts them."""
        tokens = self.sequences.index_select(0, indices.to(self.sequences.device)).to(torch.int64)
        return {"input_ids": tokens, "labels": tokens.clone()}


@dataclass(frozen=True, kw_only=True)
class TextFolder(DataConfig):
    """Text files of a folder and all below it, read as bytes and split by document.

    Parameters
    ----------
    path
        The folder; not given: the fetched data set ``python-docs``.
    patterns
        Names of the files to take.
    sequence_length
        Bytes of a sample.
    validation_fraction, test_fraction
        Share of the bytes, in whole documents; the same documents for every seed.
    """

    path: str | None = None
    patterns: tuple[str, ...] = ("*.txt", "*.rst", "*.md", "*.py")
    sequence_length: int = 256
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    limit: int | None = None
    on_device: OnDevice = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self.validation_fraction, self.test_fraction)
        if self.sequence_length < 2:
            raise ConfigError("data.sequence_length", self.sequence_length, "must be at least 2")

    def files(self) -> list[Path]:
        """The documents, sorted by path; :class:`DataError` if there is none."""
        folder = text_folder(self.path, fix="Set data.path to a folder of text files.")
        if not (found := documents_in(folder, self.patterns)):
            names, fix = " or ".join(self.patterns), "Set data.path or data.patterns."
            raise DataError(f"text folder {folder} has no file named {names}. {fix}")
        return found

    def _load(self) -> Splits:
        files = self.files()
        sizes = [file.stat().st_size + len(SEPARATOR) for file in files]
        names = ("training", "validation", "test")
        fractions = (1.0, self.validation_fraction, self.test_fraction)
        parts: list[ByteSequences | None] = []
        split = split_documents(sizes, self.validation_fraction, self.test_fraction)
        for name, fraction, documents in zip(names, fractions, split, strict=True):
            joined = b"".join(files[i].read_bytes() + SEPARATOR for i in documents)
            corpus = torch.from_numpy(np.frombuffer(joined, np.uint8).copy())
            part = ByteSequences(corpus, self.sequence_length)
            if fraction > 0 and not len(part):
                raise DataError(
                    f"text folder {text_folder(self.path)} is too small: {len(files)} documents of {sum(sizes)} bytes "
                    f"leave {part.num_bytes} bytes for the {name} part, less than one sequence of "
                    f"{self.sequence_length}. Add text, or lower data.sequence_length or the fractions."
                )
            parts.append(part if len(part) else None)
        assert parts[0] is not None
        return Splits(parts[0], parts[1], parts[2], classes=256)


def text_folder(path: str | None, *, fix: str = "") -> Path:
    """The folder at ``path``, or the fetched ``python-docs``; DataError, with a ``fix`` of the path, if there is none."""
    folder = cache_root() / "python-docs" if path is None else Path(path)
    if not folder.is_dir():
        raise DataError(f"text folder {folder} does not exist. {describe('python-docs').fix if path is None else fix}")
    return folder


def documents_in(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of a folder and all below it whose names match, sorted by path."""
    found = {file for pattern in patterns for file in folder.rglob(pattern) if file.is_file()}
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def split_documents(
    sizes: Sequence[int], validation_fraction: float, test_fraction: float
) -> tuple[list[int], list[int], list[int]]:
    """Indices of the documents for training, validation and test, by bytes, in a fixed random order.

    Test takes documents until it has its share, then validation; training gets the rest.
    """
    waiting = fixed_order(len(sizes)).tolist()
    total, parts = sum(sizes), []
    for fraction in (test_fraction, validation_fraction):
        part: list[int] = []
        taken = 0
        while waiting and taken < fraction * total:
            part.append(waiting.pop())
            taken += sizes[part[-1]]
        parts.append(sorted(part))
    return sorted(waiting), parts[1], parts[0]
