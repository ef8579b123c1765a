"""Passages of text files, each with the folder that its document is in as its label."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from hpc_oialr.data.shard_files import PARTS
from hpc_oialr.data.text import documents_in, split_documents, text_folder
from hpc_oialr.data.token_files import load_tokenizer
from hpc_oialr.errors import ConfigError, DataError


class LabelledPassages(ArrayDataset):
    """Tokens and mask (int64 [N, T]), labels (int64 [N])."""

    movable = ("tokens", "mask", "labels")

    def __init__(self, tokens: Tensor, mask: Tensor, labels: Tensor) -> None:
        self.tokens, self.mask, self.labels = tokens, mask, labels

    def __len__(self) -> int:
        return len(self.labels)

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """``{"input_ids": [B, T], "attention_mask": [B, T], "labels": [B]}``, all int64."""
        indices = indices.to(self.labels.device)
        return {
            "input_ids": self.tokens.index_select(0, indices),
            "attention_mask": self.mask.index_select(0, indices),
            "labels": self.labels.index_select(0, indices),
        }


@dataclass(frozen=True, kw_only=True)
class TextClasses(DataConfig):
    """Which of several folders a passage comes from; the passages of a document are all in one part.

    Parameters
    ----------
    path
        The folder with one folder a class; not given: the fetched data set ``python-docs``.
    classes
        Names of the folders, in the order of the labels; null = all, sorted.
    tokenizer
        A Hugging Face folder; not given: the fetched model ``minilm``.
    patterns
        Names of the files to take.
    words
        Length of a passage. Spaces and line breaks between words are not kept.
    sequence_length
        Tokens of a sample; longer passages are cut, shorter ones padded.
    per_class
        Passages of each class, all parts together, drawn from all its documents; fewer where there are not as many.
    validation_fraction, test_fraction
        Share of each class, in whole documents; the same documents for every seed.
    """

    path: str | None = None
    classes: tuple[str, ...] | None = None
    tokenizer: str | None = None
    patterns: tuple[str, ...] = ("*.txt", "*.rst", "*.md", "*.py")
    words: int = 40
    sequence_length: int = 64
    per_class: int = 1000
    validation_fraction: float = 0.15
    test_fraction: float = 0.15
    limit: int | None = None
    on_device: OnDevice = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fractions(self.validation_fraction, self.test_fraction)
        for name, least in (("words", 1), ("sequence_length", 3), ("per_class", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"data.{name}", getattr(self, name), f"must be at least {least}")

    def _load(self) -> Splits:
        folder = text_folder(self.path, fix="Set data.path to a folder with a folder a class.")
        names = self.classes or tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
        if len(names) < 2:
            raise DataError(
                f"{folder} has {len(names)} folders; a classification needs one for each class, two or more."
            )
        own = cache_root() / "minilm"
        if self.tokenizer is None and not own.is_dir():
            raise DataError(f"there is no tokenizer in {own}. {describe('minilm').fix}")
        tokenizer = load_tokenizer(own if self.tokenizer is None else Path(self.tokenizer), end=False)
        texts: dict[str, list[tuple[str, int]]] = {part: [] for part in PARTS}
        for label, name in enumerate(names):
            for part, passages in self._passages(folder / name).items():
                texts[part] += [(passage, label) for passage in passages]
        train, validation, test = (self._tokenized(texts[part], tokenizer) for part in PARTS)
        assert train is not None
        return Splits(train, validation, test, classes=len(names))

    def _passages(self, folder: Path) -> dict[str, list[str]]:
        """Those of one class by part; DataError if a part would have none."""
        files = documents_in(folder, self.patterns)
        documents = [file.read_text(encoding="utf-8", errors="replace").split() for file in files]
        fractions = (1 - self.validation_fraction - self.test_fraction, self.validation_fraction, self.test_fraction)
        split = split_documents(list(map(len, documents)), *fractions[1:])
        passages = {}
        for part, fraction, chosen in zip(PARTS, fractions, split, strict=True):
            count = round(fraction * self.per_class)
            whole = [
                " ".join(documents[i][start : start + self.words])
                for i in chosen
                for start in range(0, len(documents[i]) - self.words + 1, self.words)
            ]
            if count and not whole:
                raise DataError(
                    f"{folder} is too small: {len(files)} documents leave the {part} part no passage of {self.words} "
                    "words. Add text, name other data.classes, or lower data.words or the fractions."
                )
            passages[part] = [whole[i] for i in fixed_order(len(whole)).tolist()[:count]]
        return passages

    def _tokenized(self, texts: list[tuple[str, int]], tokenizer: Any) -> LabelledPassages | None:
        if not texts:
            return None
        settings = {"truncation": True, "padding": "max_length", "max_length": self.sequence_length}
        found = tokenizer([text for text, _ in texts], **settings, return_tensors="pt")
        return LabelledPassages(
            found["input_ids"], found["attention_mask"], torch.tensor([label for _, label in texts])
        )
