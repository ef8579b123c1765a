"""Token files for language models: written once by ``oialr data tokenize``, read memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_oialr.data.base import ArrayDataset, Batch, CounterRNG, DataConfig, Splits, check_fractions
from hpc_oialr.data.shard_files import PARTS, OpenFiles, digest, read_index, verify_files, write_files
from hpc_oialr.data.text import split_documents
from hpc_oialr.errors import ConfigError, DataError

COMMAND = "oialr data tokenize"
PATTERNS = ("*.txt", "*.rst", "*.md", "*.py", "*.jsonl")
SHARD_MIB = 64


def tokenize(
    sources: Sequence[Path | str],
    folder: Path | str,
    tokenizer: Path | str,
    *,
    patterns: Sequence[str] = PATTERNS,
    validation: float = 0.05,
    test: float = 0.0,
    shard_mib: float = SHARD_MIB,
    processes: int = 1,
    verify: bool = False,
) -> bool:
    """Write the tokens of all documents of ``sources`` into files of ``folder``; whether those of all ranks are there.

    A document is a text file, or the ``text`` of a line of a ``.jsonl`` file; the tokenizer's end-of-text token ends
    it. Parts are of whole documents, in the same random order as :class:`TextFolder`'s. Files hold tokens as
    little-endian uint16, or uint32 from a vocabulary of 65,537 on. Work is shared and continued as by
    :func:`hpc_oialr.data.pack`.

    DataError if there is no text, the tokenizer cannot be loaded or has no end-of-text token, or a file is damaged;
    OutputError if the folder holds something else.
    """
    check_fractions(validation, test)
    if shard_mib <= 0:
        raise ConfigError("shard_mib", shard_mib, "must be positive")
    paths, target = [Path(source) for source in sources], Path(folder)
    writer = TokenWriter(_files(paths, patterns), Path(tokenizer), (validation, test), int(shard_mib * 2**20))
    plan = {
        "command": COMMAND,
        "sources": [path.name for path in paths],
        "documents": digest([writer.documents.tobytes(), *(path.name.encode() for path in writer.texts.paths)]),
        "parts": {"validation": validation, "test": test},
        "shard_mib": shard_mib,
        "tokenizer": writer.tokenizer_digest,
        "vocabulary": writer.vocabulary,
        "dtype": writer.dtype,
        "end_token": writer.end,
    }
    done = write_files(target, writer, plan, processes=processes)
    if done and verify:
        verify_files(target, read_index(target, COMMAND), processes=processes)
    return done


class TokenWriter:
    """Token files of all parts, each a function of its number."""

    def __init__(self, files: Sequence[Path], tokenizer: Path, fractions: tuple[float, float], shard: int) -> None:
        self.texts, self.documents = OpenFiles(files), _documents(files)
        self.folder, self._tokenizer = tokenizer, load_tokenizer(tokenizer)
        self.tokenizer_digest = _folder_digest(tokenizer)
        self.end, self.vocabulary = int(self._tokenizer.eos_token_id), len(self._tokenizer)
        self.dtype = "uint16" if self.vocabulary <= 2**16 else "uint32"
        self.shards: list[tuple[str, list[int]]] = []
        sizes = [*map(int, self.documents[:, 2] + 1)]
        for part, chosen in zip(PARTS, split_documents(sizes, *fractions), strict=True):
            filled = shard
            for document in chosen:
                if filled >= shard:
                    self.shards.append((part, []))
                    filled = 0
                self.shards[-1][1].append(document)
                filled += sizes[document]
        counts = dict.fromkeys(PARTS, 0)
        self.names = []
        for part, _ in self.shards:
            self.names.append(f"{part}-{counts[part]:06d}.bin")
            counts[part] += 1

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_tokenizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _tokenizer=load_tokenizer(state["folder"]))

    def write(self, number: int, path: Path) -> dict[str, Any]:
        """One file."""
        part, documents = self.shards[number]
        tokens = read_bytes = 0
        with path.open("wb") as file:
            for document in documents:
                text = self._text(document)
                ids = [*self._tokenizer.encode(text, add_special_tokens=False), self.end]
                file.write(np.array(ids, f"<{np.dtype(self.dtype).str[1:]}").tobytes())
                tokens += len(ids)
                read_bytes += len(text.encode())
        return {"part": part, "tokens": tokens, "text_bytes": read_bytes, "documents": len(documents)}

    def _text(self, document: int) -> str:
        file, offset, size = self.documents[document].tolist()
        path, content = self.texts.paths[file], self.texts.read(file, offset, size)
        try:
            return str(json.loads(content)["text"]) if path.suffix == ".jsonl" else content.decode()
        except (ValueError, KeyError, TypeError) as error:
            wanted = 'a JSON object with "text"' if path.suffix == ".jsonl" else "UTF-8 text"
            raise DataError(f"{path}, from byte {offset} on, is not {wanted}: {error!r}.") from error

    def index(self, folder: Path, files: list[dict[str, Any]]) -> dict[str, Any]:
        """Tokens of each part, and how many bytes of text a token stands for."""
        tokens = {part: sum(note["tokens"] for note in files if note["part"] == part) for part in PARTS}
        ratio = sum(note["text_bytes"] for note in files) / max(1, sum(tokens.values()))
        return {"tokens": tokens, "bytes_per_token": round(ratio, 4)}


def load_tokenizer(folder: Path, *, end: bool = True) -> Any:
    """The tokenizer of a Hugging Face folder, offline.

    DataError if it cannot be loaded, or lacks an end-of-text token and ``end`` asks for one.
    """
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise DataError(f"tokenizer {folder} is not a folder. Name one with tokenizer.json or the files of a slow one.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of many kinds, by the files that are wrong
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise DataError(f"tokenizer {folder} cannot be loaded: {reason}.") from error
    if end and tokenizer.eos_token_id is None:
        fix = "Set eos_token in its tokenizer_config.json."
        raise DataError(f"tokenizer {folder} has no end-of-text token (eos_token), which ends each document. {fix}")
    tokenizer.model_max_length = 10**30  # documents are cut into sequences later; no warnings
    return tokenizer


def _folder_digest(folder: Path) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".txt", ".model"))
    return digest([part for path in files for part in (path.name.encode(), path.read_bytes())])


def _files(paths: Sequence[Path], patterns: Sequence[str]) -> list[Path]:
    """Text files, sorted within each source."""
    found: list[Path] = []
    for path in paths:
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            own = {file for pattern in patterns for file in path.rglob(pattern) if file.is_file()}
            found += sorted(own, key=lambda file: file.relative_to(path).as_posix())
        else:
            raise DataError(f"{path} does not exist. Name a folder of text files, or a file.")
    if not found:
        raise DataError(f"{', '.join(map(str, paths))}: no file named {' or '.join(patterns)}. Set --patterns.")
    return found


def _documents(files: Sequence[Path]) -> NDArray[np.int64]:
    """File, first byte and bytes of each document, int64 [documents, 3]."""
    rows = []
    for number, path in enumerate(files):
        if path.suffix != ".jsonl":
            rows.append((number, 0, path.stat().st_size))
            continue
        offset = 0
        with path.open("rb") as file:
            for line in file:
                if line.strip():
                    rows.append((number, offset, len(line)))
                offset += len(line)
    return np.array(rows, np.int64).reshape(-1, 3)


class TokenSequences(ArrayDataset):
    """Consecutive sequences of memory-mapped files, without overlap; a remainder at the end of a file is dropped."""

    def __init__(self, paths: Sequence[Path], dtype: str, length: int) -> None:
        self.paths, self.dtype, self.length = paths, np.dtype(dtype).newbyteorder("<"), length
        counts = [path.stat().st_size // self.dtype.itemsize // length for path in paths]
        self.ends = np.cumsum(counts)
        self._maps: dict[int, NDArray[Any]] = {}

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """``{"input_ids": int64 [B, T], "labels": int64 [B, T]}``, equal: the model shifts them."""
        rows = np.empty((len(indices), self.length), np.int64)
        for row, index in zip(rows, indices.tolist(), strict=True):
            file = int(np.searchsorted(self.ends, index, side="right"))
            start = (index - (int(self.ends[file - 1]) if file else 0)) * self.length
            row[:] = self._map(file)[start : start + self.length]
        tokens = torch.from_numpy(rows)
        return {"input_ids": tokens, "labels": tokens.clone()}

    def _map(self, file: int) -> NDArray[Any]:
        if file not in self._maps:
            self._maps[file] = np.memmap(self.paths[file], self.dtype, "r")
        return self._maps[file]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_maps": {}}


@dataclass(frozen=True, kw_only=True)
class TokenFiles(DataConfig):
    """Token files that ``oialr data tokenize`` wrote, memory-mapped.

    The model's vocabulary must be at least the tokenizer's: a smaller one is an error that says how large.

    Parameters
    ----------
    path
        The folder.
    sequence_length
        Tokens of a sample; sequences run on from document to document.
    """

    path: str | None = None
    sequence_length: int = 1024
    limit: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sequence_length < 2:
            raise ConfigError("data.sequence_length", self.sequence_length, "must be at least 2")

    def _load(self) -> Splits:
        if self.path is None:
            raise ConfigError("data.path", None, "must name a folder of token files", fix=f"Make one by {COMMAND}.")
        folder = Path(self.path)
        index = read_index(folder, COMMAND)
        parts: list[TokenSequences | None] = []
        for name in PARTS:
            notes = [note for note in index["files"] if note["part"] == name]
            for note in notes:
                path = folder / note["name"]
                if not path.is_file() or path.stat().st_size != note["bytes"]:
                    verify_files(folder, {"command": COMMAND, "files": [note]})
            part = TokenSequences([folder / note["name"] for note in notes], index["dtype"], self.sequence_length)
            parts.append(part if len(part) else None)
        if parts[0] is None:
            have = index["tokens"]["train"]
            raise DataError(f"{folder} has {have} tokens to train on, in no file a sequence of {self.sequence_length}.")
        return Splits(parts[0], parts[1], parts[2], classes=index["vocabulary"])
