"""The CIFAR benchmark on an archive of a few made-up images."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bases_trained, cifar
from benchmarks.cifar.images import Batches
from benchmarks.cifar.runs import RowFile
from benchmarks.cifar.training import _Run
from benchmarks.cifar.variants import Line, Variant, parse
from hpc_oialr.errors import ConfigError, DataError, UnknownNameError

Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("cat", "dog", "frog", "ship")
FIELDS = {
    "run", "seed", "size", "judged_on", "epochs", "batch", "steps", "accuracy", "train_s", "cpu_s", "update_s",
    "before_conversion", "after_conversion", "trained_share", "peak_memory_gib", "r", "curve", "device", "settings",
}  # fmt: skip


def write_archive(path: Path, part: str, count: int) -> None:
    """Bright or dark, red or green: classes that a few steps tell apart."""
    random = np.random.default_rng(len(part))
    with tarfile.open(path, "w:xz") as archive:
        for label, name in enumerate(CLASSES):
            for i in range(count):
                pixels = random.integers(0, 60, (32, 32, 3), dtype=np.uint8)
                pixels[..., label % 2] += 60 + 90 * (label // 2)
                content = io.BytesIO()
                Image.fromarray(pixels).save(content, "PNG")
                entry = tarfile.TarInfo(f"{part}/{name}/{i:04d}.png")
                entry.size = len(content.getvalue())
                archive.addfile(entry, io.BytesIO(content.getvalue()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cifar")
    write_archive(path / "images-train.tar.xz", "train", 24)
    write_archive(path / "images-test.tar.xz", "test", 10)
    return path


@pytest.fixture
def data(folder: Path) -> cifar.Images:
    return cifar.load(folder, "tiny", cache=folder / "cache")


def collect(variants: list[cifar.Variant], data: cifar.Images, **options: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    cifar.run(variants, data, "cpu", rows.append, options.pop("deadline", None), **options)
    return rows


def test_images_are_decoded_once_and_classes_are_balanced(folder: Path, data: cifar.Images) -> None:
    assert data.train_images.shape == (96, 3, 32, 32)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels[:8].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert data.test_labels.bincount().tolist() == [10] * 4
    # Label 2 is the bright red class: channel 0 holds the offset of 150.
    assert int(data.train_images[2, 0].min()) >= 150
    assert int(data.train_images[2, 1].max()) < 60
    (stored,) = (folder / "cache").iterdir()
    before = stored.stat().st_mtime_ns
    again = cifar.load(folder / "images-test.tar.xz", "tiny", cache=folder / "cache")
    assert torch.equal(again.test_images, data.test_images)
    assert stored.stat().st_mtime_ns == before


def test_validation_images_are_not_trained_on(folder: Path, data: cifar.Images) -> None:
    held = cifar.load(folder, "tiny", cache=folder / "cache", validation=True)
    assert (len(held.train_images), len(held.test_images), held.judge) == (72, 24, "validation")
    trained = {image.numpy().tobytes() for image in held.train_images}
    assert not trained & {image.numpy().tobytes() for image in held.test_images}
    assert not trained & {image.numpy().tobytes() for image in data.test_images}


def test_paths_that_hold_no_images_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds neither. Give folders train/CLASS and test/CLASS"):
        cifar.load(tmp_path, "tiny", cache=tmp_path)
    write_archive(tmp_path / "lonely-train.tar.xz", "train", 1)
    with pytest.raises(DataError, match="holds no test images"):
        cifar.load(tmp_path / "lonely-train.tar.xz", "tiny", cache=tmp_path)
    with pytest.raises(UnknownNameError, match="unknown size 'huge'.*valid: full, small, tiny"):
        cifar.load(folder, "huge")


def test_a_crop_is_a_shifted_and_perhaps_mirrored_image(data: cifar.Images) -> None:
    batches = Batches(data, 8, 0)
    chosen = torch.tensor([5])
    plain, moved = (
        batches._crop(chosen, torch.tensor([[4 + shift, 4]]), torch.tensor([shift > 0])) for shift in (0, 3)
    )
    torch.testing.assert_close(moved[0, :, :29], plain[0, :, 3:].flip(-1))
    epoch = list(batches.epoch())
    assert len(epoch) == 12
    assert sorted(torch.cat([labels for _, labels in epoch]).tolist()) == sorted(data.train_labels.tolist())


def test_dense_and_low_rank_train_and_say_all(data: cifar.Images) -> None:
    variants = [replace(variant, epochs=4) for variant in cifar.standard_variants()]
    rows = collect(variants, data, evaluations=4)
    assert [row["run"] for row in rows] == [variant.name for variant in variants]
    for row in rows:
        assert set(row) == FIELDS
        assert [point["step"] for point in row["curve"]] == [3, 6, 9, 12]
        assert row["accuracy"] == row["curve"][-1]["accuracy"]
        assert 0 < row["curve"][0]["cpu_s"] <= row["cpu_s"]
        assert row["peak_memory_gib"] > 0.001
        json.dumps(row, allow_nan=False)
    dense, low_rank = rows[0], rows[1]
    assert dense["accuracy"] > 0.5
    assert (dense["trained_share"], dense["r"], dense["before_conversion"]) == (1.0, {}, None)
    assert low_rank["trained_share"] < 0.1
    assert set(low_rank["r"].values()) == {8}
    assert 0 <= low_rank["after_conversion"] <= 1
    assert low_rank["update_s"] > 0
    assert rows[3]["r"]["vit.layers.0.mlp.fc1"] == 16
    assert rows[-1]["settings"]["carry"] is False


class HostReads(TorchDispatchMode):
    """Names of operations that make the host wait for a GPU, or copy to it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in (
            "_local_scalar_dense",
            "lift_fresh",
            "lift_fresh_copy",
            "nonzero",
        ):
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("index", [0, 1, 4])
def test_a_step_waits_for_nothing(data: cifar.Images, index: int) -> None:
    """Dense Muon, cores, AdamW with clipping; two steps, of which the first makes the optimizer's state."""
    run = _Run(replace(cifar.standard_variants()[index], epochs=4.0, batch=32, clip=1.0), data, 0)
    batches = run.batches.epoch()
    with HostReads() as sanity:
        float(torch.ones(()))
    assert sanity.found == ["_local_scalar_dense"]
    run.compute(dict(zip(("pixel_values", "labels"), next(batches), strict=True)))
    if run.oialr is not None:
        run.oialr.step()
        assert run.oialr.r
    run.compute(dict(zip(("pixel_values", "labels"), next(batches), strict=True)))
    with HostReads() as reads:
        run.compute(dict(zip(("pixel_values", "labels"), next(batches), strict=True)))
    assert reads.found == []


def test_a_seed_gives_the_same_run_again(data: cifar.Images) -> None:
    variant = replace(cifar.standard_variants()[1], epochs=2)
    first, other, again = (collect([variant], data, seeds=[seed])[0] for seed in (0, 1, 0))

    def bits(row: dict[str, Any]) -> list[Any]:
        return [(point["loss"], point["accuracy"]) for point in row["curve"]]

    assert bits(first) == bits(again) != bits(other)


def test_finished_runs_are_skipped_and_files_are_whole(data: cifar.Images, tmp_path: Path) -> None:
    dense = replace(cifar.standard_variants()[0], epochs=1)
    file, other = RowFile(tmp_path / "rows.json"), RowFile(tmp_path / "rows.json")
    cifar.run([dense], data, "cpu", file.add, None, seeds=[0], evaluations=1)
    file.add({**file.rows()[0], "seed": 7, "left_out": "no time"})
    cifar.run([dense], data, "cpu", other.add, None, seeds=[0, 7], evaluations=1, finished=other.rows())
    assert [row["seed"] for row in file.rows()] == [0, 7]
    assert file.rows()[0] == json.loads((tmp_path / "rows.json").read_text())["rows"][0]
    assert collect([dense], data, finished=file.rows()) == []
    assert len(collect([replace(dense, lr=0.01)], data, evaluations=1, finished=file.rows())) == 1


def test_runs_past_the_deadline_are_named(data: cifar.Images) -> None:
    dense = replace(cifar.standard_variants()[0], epochs=1)
    endless = replace(dense, name="endless", epochs=1e6)
    rows = collect([dense, endless], data, deadline=time.monotonic() + 1000, evaluations=1)
    assert "left_out" not in rows[0]
    assert rows[1]["run"] == "endless"
    assert rows[1]["left_out"].startswith("needs about ")
    (late,) = collect([dense], data, deadline=time.monotonic() - 1)
    assert late["left_out"] == "needs about 0 s, 0 s are left"


def test_variants_from_words_and_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text('[{"name": "from file", "base": "OIALR k/4", "cuts": 4, "rule": "Energy:0.9"}]')
    words = [
        "dense AdamW",
        "warm:base=dense AdamW,lr=1e-3,clip=5",
        "x:low_rank=true,carry=false,rule=NoiseEdge",
    ]
    plain, warm, own, listed = parse([*words, str(path)])
    assert plain.lr == 5e-4
    assert (warm.name, warm.lr, warm.optimizer, warm.clip) == ("warm", 1e-3, "adamw", 5.0)
    assert (own.low_rank, own.carry) == (True, False)
    assert (listed.cuts, listed.core_lr) == (4, 0.01)
    config, rule = listed.oialr(1000, 768)
    assert (config.delay, config.frequency, config.limits.round_to) == (100, 75, 64)
    assert type(rule).__name__ == "Energy"


@pytest.mark.parametrize(
    ("word", "error", "message"),
    [
        ("dense Mouon", UnknownNameError, "Did you mean 'dense Muon'?"),
        ("x:lrr=1", UnknownNameError, "unknown setting 'lrr'"),
        ("x:lr=fast", ConfigError, "lr is 'fast' .*must be a number"),
        ("x:cuts=1.5", ConfigError, "cuts is '1.5' .*must be a number"),
        ("x:low_rank=1", ConfigError, "low_rank is 1.0 .*must be bool"),
        ("x:optimizer=sgd", UnknownNameError, "unknown optimizer 'sgd'"),
        ("x:rule=Magic", UnknownNameError, "unknown rule 'Magic'"),
        ("x:rule=NoiseEdge:2", ConfigError, "takes none"),
        ("x:delay=.5,until=.4", ConfigError, "until is 0.4; must lie in \\(0.5, 1\\]"),
        ("x:fraction=.75", ConfigError, "fraction is 0.75; must be at most at_conversion = 0.5"),
    ],
)
def test_wrong_variants_are_refused(word: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse([word])


def test_bases_are_free_in_a_part_of_the_run() -> None:
    always, middle, never = (
        Variant(name="x", low_rank=True, free_from=start, free_until=end).oialr(1000, 192)[0]
        for start, end in ((0.0, None), (0.3, 0.6), (None, None))
    )
    assert always.bases_trained == [(0, None)]
    assert (middle.bases_trained, never.frees_bases) == ([(300, 600)], False)
    assert {variant.name for variant in bases_trained.variants()} >= {
        "cores",
        "factors",
        "factors at the end",
    }


def test_r_falls_down_a_straight_line() -> None:
    line = Line(0.5, 0.25)
    found = []
    for line.progress in (0.0, 0.5, 1.0, 3.0):
        found.append(line.choose(torch.ones(384), 3072, 768))
    assert found == [384, 288, 192, 192]


@pytest.mark.long
def test_it_runs_as_a_command_without_the_suite(folder: Path, tmp_path: Path) -> None:
    """Where only torch, transformers and pillow are installed, as on a machine with a GPU."""
    hidden = "import runpy, sys; sys.modules.update(dict.fromkeys(('jsonargparse', 'deepspeed', 'mpi4py')));"
    code = f"{hidden} sys.argv[0] = 'cifar'; runpy.run_module('benchmarks.cifar', run_name='__main__')"
    out = tmp_path / "rows.json"
    options = [
        "--data",
        str(folder),
        "--size",
        "tiny",
        "--epochs",
        "1",
        "--cache",
        str(tmp_path),
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-c", code, *options, "--variants", "OIALR k/4", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OIALR k/4, 0, ")
    content = json.loads(out.read_text())
    assert content["rows"][0]["epochs"] == 1
    assert content["environment"]["packages"]["torch"]
