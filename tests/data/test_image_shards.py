"""Packing and reading image shards; each image is of one grey level, which says who it is."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import tarfile
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.mpirun import mpirun, needs_mpirun

from hpc_oialr.cli.main import main
from hpc_oialr.data import CIFAR10, GlobalBatches, ImageFolder, ImageShards, pack
from hpc_oialr.data.image_arrays import Normalisation
from hpc_oialr.data.image_folder import MEAN, STD, ImageConfig
from hpc_oialr.data.image_shards import ShardWriter
from hpc_oialr.data.image_sources import RECORD, open_source
from hpc_oialr.errors import DataError, SampleError
from hpc_oialr.outputs import OutputError

TRAIN, VAL, LEVEL = 48, 6, 5
PLAIN: dict[str, Any] = {"size": 8, "evaluation_share": 1.0, "augment": None}


def jpeg(number: int) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (16, 16), (LEVEL * number,) * 3).save(target, "JPEG", quality=95)
    return target.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for part, count in (("train", TRAIN), ("val", VAL)):
        for i in range(count):
            path = root / part / f"class_{i % 3}" / f"{i:02d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(i))
    return root


@pytest.fixture(scope="module")
def packed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("packed") / "shards"
    assert pack([folder], target, per_shard=10, verify=True)
    return target


def write_webdataset(path: Path) -> Path:
    path.mkdir()
    for part, count in (("train", TRAIN), ("val", VAL)):
        with tarfile.open(path / f"images-{part}-000.tar", "w") as archive:
            for i in range(count):
                for suffix, content in (("JPG", jpeg(i)), ("cls", str(i % 3).encode())):
                    info = tarfile.TarInfo(f"some/{i:02d}.{suffix}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return path


def who(batch: dict[str, torch.Tensor]) -> list[int]:
    """The numbers of the images of a batch."""
    numbers: list[int] = (batch["pixel_values"].float().mean((1, 2, 3)) / LEVEL).round().int().tolist()
    return numbers


def shards(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.is_file()}


@pytest.mark.parametrize("form", ["folder", "packed", "WebDataset"])
def test_no_sample_is_lost_or_doubled_on_another_world_size(
    form: str, folder: Path, packed: Path, tmp_path: Path
) -> None:
    """Interrupted in mid-epoch on 2 ranks, resumed on 4: the epoch of one rank, in its order."""
    config: ImageConfig
    if form == "folder":
        config = ImageFolder(path=str(folder), **PLAIN)
    else:
        config = ImageShards(path=str(packed if form == "packed" else write_webdataset(tmp_path / "web")), **PLAIN)
    train = config.build().train

    def seen(size: int, steps: range) -> list[list[int]]:
        ranks = []
        for rank in range(size):
            batches = GlobalBatches(train, 8, world_rank=rank, world_size=size, seed=3, training=True)
            ranks.append([who(batch) for batch in batches.epoch(1, steps.start)][: len(steps)])
        return [list(chain(*parts)) for parts in zip(*ranks, strict=True)]

    alone, resumed = seen(1, range(6)), [*seen(2, range(2)), *seen(4, range(2, 6))]
    assert resumed == alone
    assert sorted(chain(*resumed)) == list(range(TRAIN))


def test_packed_images_keep_bytes_labels_and_parts(folder: Path, packed: Path) -> None:
    splits, original = ImageShards(path=str(packed), **PLAIN).build(), open_source([folder])
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), splits.test, splits.classes) == (TRAIN, VAL, None, 3)
    batch = splits.train.gather(torch.arange(TRAIN))
    assert [number % 3 for number in who(batch)] == batch["labels"].tolist()
    with tarfile.open(packed / "train-000001.tar") as archive:
        names = archive.getnames()
        contents = {archive.extractfile(name).read() for name in names if name.endswith(".jpg")}  # type: ignore[union-attr]
    assert names[:3] == ["000000010.jpg", "000000010.cls", "000000011.jpg"]
    assert len(contents) == 10
    assert contents < {original.read("train", i)[1] for i in range(TRAIN)}
    # The shards are WebDataset: read without their index they hold the same.
    listed = open_source([packed / f"train-{i:06d}.tar" for i in range(5)])
    assert listed.labels("train").tolist() == splits.train.gather(torch.arange(TRAIN))["labels"].tolist()


def killed_pack(folder: Path, target: Path) -> None:
    """Dies in the middle of the third shard."""
    write = ShardWriter.write

    def dying(self: ShardWriter, number: int, path: Path) -> dict[str, Any]:
        facts = write(self, number, path)
        if number == 2:
            path.write_bytes(path.read_bytes()[:2000])
            os.kill(os.getpid(), signal.SIGKILL)
        return facts

    ShardWriter.write = dying  # type: ignore[method-assign]
    pack([folder], target, per_shard=10)


@pytest.mark.slow
def test_killed_and_continued_by_others_gives_the_same_bytes(
    folder: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "shards"
    process = multiprocessing.get_context("spawn").Process(target=killed_pack, args=(folder, target))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(file.name for file in target.glob("[!.]*.tar")) == ["train-000000.tar", "train-000001.tar"]
    with pytest.raises(DataError, match="is not finished: run the same command again"):
        ImageShards(path=str(target)).build()
    kept = (target / "train-000000.tar").stat().st_mtime_ns
    for rank, complete in ((1, False), (0, True)):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "29999")
        assert pack([folder], target, per_shard=10, processes=1 + rank) == complete
    assert (target / "train-000000.tar").stat().st_mtime_ns == kept
    assert shards(target) == shards(packed)


@pytest.mark.mpi
@needs_mpirun
def test_under_mpi_and_submitit(folder: Path, packed: Path, tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    target = tmp_path / "mpi"
    ran = mpirun(2, "-m", "hpc_oialr", "data", "pack", str(folder), str(target), "--per-shard", "10")
    assert ran.returncode == 0, ran.stderr
    assert shards(target) == shards(packed)
    executor = submitit.LocalExecutor(folder=tmp_path / "logs")
    executor.update_parameters(tasks_per_node=2, timeout_min=2)
    job = executor.submit(pack, [folder], tmp_path / "submitit", per_shard=10)
    assert True in job.results()
    assert shards(tmp_path / "submitit") == shards(packed)


def test_a_damaged_shard_is_named_and_written_anew(
    folder: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "shards"
    pack([folder], target, per_shard=10)
    shard = target / "train-000003.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1  # within the first image
    shard.write_bytes(content)
    train = ImageShards(path=str(target), **PLAIN).build().train
    assert len(train.gather(torch.arange(30))["labels"]) == 30
    with pytest.raises(
        SampleError, match=r"train-000003\.tar is damaged: the image at byte 512, of label \d, has another"
    ):
        train.gather(torch.arange(25, 35))
    assert main(["data", "verify", str(target)]) == 2
    said = capsys.readouterr().err
    assert "train-000003.tar is damaged: sha256" in said
    assert "train-000002" not in said
    (target / "val-000000.tar").write_bytes(b"short")
    (target / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar is missing \(1 of 5 shards of train\)"):
        ImageShards(path=str(target)).build()
    assert main(["data", "verify", str(target), "--discard"]) == 2
    said = capsys.readouterr().err
    for text in (
        "train-000000.tar is missing",
        "train-000003.tar is damaged",
        "val-000000.tar is damaged: 5 bytes, not",
    ):
        assert text in said
    assert main(["data", "pack", str(folder), str(target), "--per-shard", "10", "--verify"]) == 0
    assert shards(target) == shards(packed)
    assert main(["data", "verify", str(target)]) == 0
    (target / "train.npy").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"train\.npy is damaged"):
        ImageShards(path=str(target)).build()


def test_a_truncated_shard_is_named(packed: Path, tmp_path: Path) -> None:
    web = write_webdataset(tmp_path / "web")
    train = ImageShards(path=str(web), **PLAIN).build().train
    with (web / "images-train-000.tar").open("r+b") as file:
        file.truncate(10_000)
    with pytest.raises(SampleError, match=r"images-train-000\.tar is damaged: it ends at byte 10000, within an image"):
        train.gather(torch.arange(20))


@pytest.mark.parametrize("archive", [None, "cifar-10-binary.tar.gz"])
def test_cifar10_binary_loses_nothing(archive: str | None, tmp_path: Path) -> None:
    source = tmp_path / "cifar-10-batches-bin"
    source.mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        records = rng.integers(0, 256, (4, RECORD), dtype=np.uint8)
        records[:, 0] = (np.arange(4) + i) % 10
        (source / name).write_bytes(records.tobytes())
    packing = source
    if archive is not None:
        packing = tmp_path / archive
        with tarfile.open(packing, "w:gz") as tar:
            tar.add(source, source.name)
    assert pack([packing], tmp_path / "shards", per_shard=7)
    splits = ImageShards(path=str(tmp_path / "shards"), size=32, evaluation_share=1.0, augment=None).build()
    assert splits.test is not None
    assert (len(splits.train), len(splits.test), splits.validation, splits.classes) == (20, 4, None, 10)
    wanted, labels = CIFAR10.read(source, training=True)
    batch = splits.train.example(20)
    found = {
        (int(label), image.numpy().tobytes())
        for label, image in zip(batch["labels"], batch["pixel_values"], strict=True)
    }
    normalise = Normalisation(MEAN, STD)
    assert found == {
        (int(label), image.numpy().tobytes()) for label, image in zip(labels, normalise(wanted), strict=True)
    }


def test_compressed_tars_of_folders_are_packed(folder: Path, packed: Path, tmp_path: Path) -> None:
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"photos-{part}.tar.xz", "w:xz") as archive:
            archive.add(folder / part, f"photos/{part}")
    target = tmp_path / "shards"
    assert pack(sorted(tmp_path.glob("*.tar.xz")), target, per_shard=10)
    assert not (target / ".unpacked").exists()
    train = ImageShards(path=str(target), **PLAIN).build().train
    assert sorted(who(train.gather(torch.arange(TRAIN)))) == list(range(TRAIN))
    assert json.loads((target / "index.json").read_text())["classes"] == ["class_0", "class_1", "class_2"]
    with pytest.raises(DataError, match=r"photos-train\.tar\.xz is compressed and cannot be read in any order"):
        ImageShards(path=str(tmp_path)).build()


def test_what_cannot_be_packed_is_refused(folder: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"was begun with per_shard = 10, and this is 20\. Give the same"):
        pack([folder], packed, per_shard=20)
    with pytest.raises(OutputError, match="holds other files. Name a new folder"):
        pack([folder], folder)
    with pytest.raises(DataError, match="no-such does not exist"):
        pack([tmp_path / "no-such"], tmp_path / "a")
    (tmp_path / "x").mkdir()
    with pytest.raises(DataError, match="there are no images here. Wanted: part/CLASS/image files"):
        pack([tmp_path / "x"], tmp_path / "b")
    with tarfile.open(tmp_path / "only-test.tar", "w") as archive:
        archive.add(folder / "val", "test")
    with pytest.raises(DataError, match="there are images of test, but none to train on"):
        pack([tmp_path / "only-test.tar"], tmp_path / "c")
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(folder / "train", "photos")
    with pytest.raises(
        DataError, match=r"photos\.tar does not say which part it is: put train, val or test into its name"
    ):
        pack([tmp_path / "photos.tar"], tmp_path / "d")
    (tmp_path / "bad.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(DataError, match=r"bad\.tar is not a tar archive, or a damaged one"):
        pack([tmp_path / "bad.tar"], tmp_path / "e")
