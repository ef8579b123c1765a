"""Token files by a small BPE tokenizer that is trained here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_runs import write_recipe, write_text_folder
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hpc_oialr.cli.main import main
from hpc_oialr.data import TokenFiles, tokenize
from hpc_oialr.data.base import ArrayDataset
from hpc_oialr.data.token_files import TokenWriter
from hpc_oialr.distributed import World
from hpc_oialr.errors import ConfigError, DataError
from hpc_oialr.outputs import OutputError
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import train

END = "<|end|>"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 text files, and 5 documents in a .jsonl."""
    folder = write_text_folder(tmp_path_factory.mktemp("text"))
    lines = [json.dumps({"text": f"basis {i} rotates: ä", "id": i}) for i in range(5)]
    (folder / "more.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    made.train([str(file) for file in texts.glob("*.txt")], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END).save_pretrained(folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def tokens_of(part: ArrayDataset | None) -> list[int]:
    assert part is not None
    found: list[int] = part.gather(torch.arange(len(part)))["input_ids"].flatten().tolist()
    return found


def test_every_document_is_there_once_and_ends(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    target = tmp_path / "tokens"
    assert tokenize([texts], target, tokenizer, validation=0.2, test=0.1, shard_mib=0.001, verify=True)
    index = json.loads((target / "index.json").read_text())
    assert index["dtype"] == "uint16"
    assert len([note for note in index["files"] if note["part"] == "train"]) >= 3
    decode = AutoTokenizer.from_pretrained(str(tokenizer)).decode
    found: list[str] = []
    for part in ("train", "val", "test"):
        files = sorted(target.glob(f"{part}-*.bin"))
        stored = np.concatenate([np.fromfile(file, "<u2") for file in files])
        assert len(stored) == index["tokens"][part]
        documents = decode(stored.tolist()).split(END)
        assert documents.pop() == ""
        found += documents
    wanted = [file.read_text() for file in texts.glob("*.txt")]
    wanted += [f"basis {i} rotates: ä" for i in range(5)]
    assert sorted(found) == sorted(wanted)
    size = sum(len(text.encode()) for text in wanted)
    assert index["bytes_per_token"] == pytest.approx(size / sum(index["tokens"].values()), abs=1e-4)


def test_sequences_are_slices_of_the_files(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    tokenize([texts], tmp_path / "tokens", tokenizer, validation=0.2, shard_mib=0.001)
    splits = TokenFiles(path=str(tmp_path / "tokens"), sequence_length=7).build()
    stored = [np.fromfile(file, "<u2") for file in sorted((tmp_path / "tokens").glob("train-*.bin"))]
    wanted = np.concatenate([tokens[: len(tokens) // 7 * 7] for tokens in stored])
    assert tokens_of(splits.train) == wanted.tolist()
    batch = splits.train.gather(torch.tensor([5, 0]))
    assert batch["input_ids"].tolist() == [wanted[35:42].tolist(), wanted[:7].tolist()]
    assert torch.equal(batch["labels"], batch["input_ids"])
    assert (splits.test, splits.classes) == (None, len(AutoTokenizer.from_pretrained(str(tokenizer))))


def test_interrupted_and_continued_by_others_gives_the_same_files(
    texts: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, target = tmp_path / "reference", tmp_path / "tokens"
    assert tokenize([texts], reference, tokenizer, shard_mib=0.001)
    write = TokenWriter.write

    def failing(self: TokenWriter, number: int, path: Path) -> dict[str, object]:
        if number == 2:
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt
        return write(self, number, path)

    with monkeypatch.context() as patch:
        patch.setattr(TokenWriter, "write", failing)
        with pytest.raises(KeyboardInterrupt):
            tokenize([texts], target, tokenizer, shard_mib=0.001)
    with pytest.raises(DataError, match="is not finished: run the same command again"):
        TokenFiles(path=str(target)).build()
    for rank, complete in ((1, False), (0, True)):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "29999")
        assert tokenize([texts], target, tokenizer, shard_mib=0.001) == complete
    assert content(target) == content(reference)


def test_gpt_trains_on_it(texts: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "tokens"
    options = ["--tokenizer", str(tokenizer), "--validation", "0.2", "--test", "0.2"]
    assert main(["data", "tokenize", str(texts), str(target), *options, "--verify"]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    recipe = write_recipe(tmp_path)
    settings = ["--" + words.strip() for words in said.partition("--")[2].split("--")]
    words = [word for setting in settings for word in setting.split(" ", 1)]
    assert words[0::2] == ["--data", "--data.path", "--model.vocabulary", "--task.bytes_per_token"]
    loaded = load_config(recipe, [*words, "--data.sequence_length", "16"])
    summary = train(loaded, tmp_path / "run", world=World.single("cpu")).summary
    assert summary is not None
    assert summary["metric_name"] == "test_bits_per_byte"
    assert summary["metric"] < 0.95 * np.log2(300) / json.loads((target / "index.json").read_text())["bytes_per_token"]
    few = load_config(recipe, [*words, "--data.sequence_length", "16", "--model.vocabulary", "256"])
    with pytest.raises(ConfigError, match=r"model\.vocabulary is 256.*must be at least 2\d\d"):
        train(few, tmp_path / "other", world=World.single("cpu"))


def test_a_damaged_file_is_named(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    target = tmp_path / "tokens"
    tokenize([texts], target, tokenizer, shard_mib=0.001)
    before = content(target)
    file = target / "train-000001.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"train-000001\.bin is damaged: \d+ bytes, not \d+"):
        TokenFiles(path=str(target), sequence_length=8).build()
    assert main(["data", "verify", str(target), "--discard"]) == 2
    assert tokenize([texts], target, tokenizer, shard_mib=0.001, verify=True)
    assert content(target) == before


def test_what_cannot_be_done_is_refused(texts: Path, tokenizer: Path, tmp_path: Path) -> None:
    target = tmp_path / "tokens"
    tokenize([texts], target, tokenizer)
    with pytest.raises(OutputError, match="was begun with shard_mib = 64, and this is 1"):
        tokenize([texts], target, tokenizer, shard_mib=1)
    with pytest.raises(DataError, match="no-such is not a folder"):
        tokenize([texts], tmp_path / "a", tmp_path / "no-such")
    with pytest.raises(DataError, match="cannot be loaded"):
        tokenize([texts], tmp_path / "b", texts)
    endless = tmp_path / "endless"
    PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json")).save_pretrained(endless)
    with pytest.raises(DataError, match="has no end-of-text token"):
        tokenize([texts], tmp_path / "c", endless)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"words": 3}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, from byte 17 on, is not a JSON object with \"text\""):
        tokenize([bad], tmp_path / "d", tokenizer)
    with pytest.raises(DataError, match="no file named"):
        tokenize([texts], tmp_path / "e", tokenizer, patterns=["*.tex"])
    with pytest.raises(DataError, match="in no file a sequence of 100000"):
        TokenFiles(path=str(target), sequence_length=100_000).build()
