"""A tiny pretrained BERT with its tokenizer, and texts of two kinds to fine-tune it on."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

WORDS = {"a": ["low", "rank", "core", "basis", "the", "of"], "b": ["stable", "training", "pays", "step", "the", "of"]}
RECIPE: dict[str, Any] = {
    "task": {"class_path": "TextClassification"},
    "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.02}},
    "schedule": {"class_path": "WarmupCosine", "init_args": {"warmup": 0.1}},
    "oialr": None,
    "train": {"steps": 8, "global_batch": 8, "evaluations": 1, "evaluation_batch": 16, "device": "cpu"},
    "checkpoint": {"every": 4, "keep": 2},
    "record": {"every": 1},
}


def write_tokenizer(folder: Path, words: Collection[str]) -> int:
    """One token a word; the size of its vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = [*special, *sorted(words)]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    return len(vocabulary)


def write_bert(folder: Path, *, dropout: float = 0.1) -> Path:
    """A ``BertModel`` of width 16 with random weights, saved as pretrained models are."""
    from transformers import BertConfig, BertModel

    size = write_tokenizer(folder, {word for each in WORDS.values() for word in each})
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def write_texts(folder: Path) -> Path:
    """Eight documents of each kind: the kinds share two words of six."""
    generator = np.random.default_rng(0)
    for kind, words in WORDS.items():
        (folder / kind).mkdir(parents=True)
        for i in range(8):
            text = " ".join(words[j] for j in generator.integers(len(words), size=60))
            (folder / kind / f"{i}.txt").write_text(text)
    return folder


def write_recipe(folder: Path, method: dict[str, Any], *, dropout: float = 0.1) -> Path:
    """A recipe that fine-tunes the one on the others; all three in ``folder``."""
    bert = folder / "bert"
    if not bert.exists():
        write_bert(bert, dropout=dropout)
        write_texts(folder / "texts")
    data = {"path": str(folder / "texts"), "tokenizer": str(bert), "words": 6, "sequence_length": 9, "per_class": 60}
    sections = {
        "data": {"class_path": "TextClasses", "init_args": data},
        "model": {"class_path": "PretrainedClassifier", "init_args": {"path": str(bert), "method": method}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(sections | RECIPE))
    return path
