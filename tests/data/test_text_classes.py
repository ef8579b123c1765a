from __future__ import annotations

import pytest
import torch
from support.tiny_bert import write_tokenizer

from hpc_oialr.data import TextClasses
from hpc_oialr.errors import DataError

WORDS = [f"{kind}{i}" for kind in "ab" for i in range(10)]


@pytest.fixture
def texts(tmp_path):
    """Ten documents of each class, each of 23 times its own word; the tokenizer knows them all."""
    for word in WORDS:
        file = tmp_path / "texts" / word[0] / "deeper" / f"{word}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(" ".join([word] * 23) + "\n")
    write_tokenizer(tmp_path / "tokenizer", WORDS)
    return {"path": str(tmp_path / "texts"), "tokenizer": str(tmp_path / "tokenizer"), "sequence_length": 8}


def test_passages_of_a_document_are_all_in_one_part(texts):
    config = TextClasses(**texts, words=5, per_class=30, validation_fraction=0.2, test_fraction=0.2)
    splits, found = config.build(), []
    for part, count in ((splits.train, 18), (splits.validation, 6), (splits.test, 6)):
        batch = part.gather(torch.arange(len(part)))
        assert torch.bincount(batch["labels"]).tolist() == [count] * 2
        # [CLS], five times the document's word, [SEP], padding.
        assert batch["attention_mask"].sum(1).tolist() == [7] * len(part)
        words = batch["input_ids"][:, 1]
        assert torch.equal(batch["input_ids"][:, 1:6], words[:, None].expand(-1, 5))
        assert torch.equal((words - 4) // 10, batch["labels"])
        found.append(set(words.tolist()))
    assert len(set.union(*found)) == sum(map(len, found))
    again = config.build().train.gather(torch.arange(3))
    assert torch.equal(again["input_ids"], splits.train.gather(torch.arange(3))["input_ids"])
    cut = TextClasses(**{**texts, "sequence_length": 4}, words=5, classes=("b", "a")).build()
    assert cut.train.gather(torch.tensor([0]))["input_ids"].shape == (1, 4)
    assert int(cut.train.gather(torch.tensor([0]))["input_ids"][0, 1] - 4) // 10 == 1, "label 0 is class b"


def test_what_it_cannot_read(texts, tmp_path):
    with pytest.raises(DataError, match=r"is too small: 10 documents leave the train part no passage of 24 words"):
        TextClasses(**texts, words=24).build()
    with pytest.raises(DataError, match=r"has 1 folders; a classification needs one for each class"):
        TextClasses(**{**texts, "path": str(tmp_path / "texts" / "a")}).build()
    with pytest.raises(DataError, match="is not a folder"):
        TextClasses(**{**texts, "tokenizer": str(tmp_path / "none")}).build()
