from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_oialr.data import TextFolder
from hpc_oialr.data.text import ByteSequences, split_documents
from hpc_oialr.errors import ConfigError, DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for i in range(40):
        file = tmp_path / f"part{i % 3}" / f"{i:02}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"document {i:02}: " + "ä" * (10 + i))
    (tmp_path / "picture.png").write_bytes(b"\xff" * 1000)
    return tmp_path


def text_of(part: ByteSequences) -> bytes:
    return bytes(part.gather(torch.arange(len(part)))["input_ids"].flatten().tolist())


def test_parts_hold_whole_documents_joined_by_a_separator(corpus: Path) -> None:
    config = TextFolder(path=str(corpus), sequence_length=2, validation_fraction=0.2, test_fraction=0.2)
    splits, files = config.build(), config.files()
    assert len(files) == 40
    assert files == sorted(files)
    found = []
    for part, share in ((splits.train, 0.6), (splits.validation, 0.2), (splits.test, 0.2)):
        assert isinstance(part, ByteSequences)
        documents = text_of(part).removesuffix(b"\0").split(b"\0")
        assert abs(part.num_bytes - share * sum(file.stat().st_size + 1 for file in files)) < 2 * 120
        found += documents[:-1]  # The last one may have lost its last byte.
        assert all(document in {file.read_bytes() for file in files} for document in documents[:-1])
    assert len(found) == len(set(found)) == 37


def test_sequences_do_not_overlap_and_labels_equal_inputs() -> None:
    part = ByteSequences(torch.arange(11, dtype=torch.uint8), 4)
    batch = part.gather(torch.tensor([1, 0]))
    assert len(part) == 2
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    assert batch["labels"].data_ptr() != batch["input_ids"].data_ptr()


def test_same_bytes_every_time_and_limit_cuts_training(corpus: Path) -> None:
    first, second = (TextFolder(path=str(corpus), sequence_length=8).build().train for _ in range(2))
    assert isinstance(first, ByteSequences)
    assert isinstance(second, ByteSequences)
    assert text_of(first) == text_of(second)
    assert len(TextFolder(path=str(corpus), sequence_length=8, limit=3).build().train) == 3


def test_no_fraction_no_part(corpus: Path) -> None:
    splits = TextFolder(path=str(corpus), sequence_length=8, validation_fraction=0, test_fraction=0).build()
    assert splits.validation is None
    assert splits.test is None


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 1000), min_size=1, max_size=50),
    validation=st.floats(0, 0.4),
    test=st.floats(0, 0.4),
)
def test_split_deals_each_document_once(sizes: list[int], validation: float, test: float) -> None:
    train, held_out, last = split_documents(sizes, validation, test)
    assert sorted(train + held_out + last) == list(range(len(sizes)))
    assert (last == []) == (test == 0)
    taken = sum(sizes[i] for i in last)
    assert test * sum(sizes) <= taken
    assert taken == 0 or any(taken - sizes[i] < test * sum(sizes) for i in last)


def test_model_takes_the_batch(corpus: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    train = TextFolder(path=str(corpus), sequence_length=16).build().train
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=16, n_embd=8, n_layer=1, n_head=1))
    assert 0 < float(model(**train.gather(torch.arange(3))).loss.detach()) < 10


def test_missing_empty_or_small_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"text folder .*none does not exist\. Set data\.path"):
        TextFolder(path=str(tmp_path / "none")).build()
    with pytest.raises(DataError, match=r"has no file named \*\.txt or \*\.md\. Set data\.path or"):
        TextFolder(path=str(tmp_path), patterns=("*.txt", "*.md")).build()
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(DataError) as caught:
        TextFolder(path=str(tmp_path)).build()
    assert "is too small: 1 documents of 6 bytes leave 0 bytes for the training part, less than one " in str(
        caught.value
    )
    monkeypatch.setenv("OIALR_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"python-docs does not exist\. Run `oialr data fetch python-docs`"):
        TextFolder().build()


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.sequence_length is 1; must be at least 2\."):
        TextFolder(sequence_length=1)
    with pytest.raises(ConfigError, match=r"data\.test_fraction is 1\.0; must lie in \[0, 1\)\."):
        TextFolder(test_fraction=1.0)
    with pytest.raises(ConfigError, match=r"is 1\.2; must leave a part to train on, i\.e\. lie below 1\."):
        TextFolder(validation_fraction=0.6, test_fraction=0.6)
