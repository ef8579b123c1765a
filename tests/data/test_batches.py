from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpc_oialr.data.base import ArrayDataset, Batch, CounterRNG, Splits
from hpc_oialr.data.batches import GlobalBatches
from hpc_oialr.data.image_arrays import FlipAndCrop, ImageArrays, split_off
from hpc_oialr.data.image_folder import ResizedCrop
from hpc_oialr.data.text import split_documents
from hpc_oialr.errors import ConfigError


class Numbers(ArrayDataset):
    """Sample i is the number i; augmentation adds a random fraction to it."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        noise = torch.zeros(len(indices), dtype=torch.float64)
        if rng is not None:
            noise = rng.integers(indices, 1 << 20, stream=1) / (1 << 20)
        return {"x": indices.to(torch.float64) + noise}


def training(n: int, global_batch: int, seed: int = 0, rank: int = 0, size: int = 1) -> GlobalBatches:
    return GlobalBatches(
        Numbers(n),
        global_batch,
        world_rank=rank,
        world_size=size,
        seed=seed,
        training=True,
    )


def values(batches: GlobalBatches, epoch: int = 0, start: int = 0) -> list[list[float]]:
    return [batch["x"].tolist() for batch in batches.epoch(epoch, start)]


def joined(parts: Iterable[list[float]]) -> list[float]:
    return [x for part in parts for x in part]


@settings(deadline=None, max_examples=40)
@given(
    per_process=st.integers(1, 5),
    steps=st.integers(1, 5),
    tail=st.integers(0, 19),
    seed=st.integers(0, 1000),
    epoch=st.integers(0, 100),
    data=st.data(),
)
def test_slices_join_to_the_same_global_batches_also_after_a_resume(
    per_process: int, steps: int, tail: int, seed: int, epoch: int, data: st.DataObject
) -> None:
    batch = 4 * per_process
    n = steps * batch + tail % batch
    whole = values(training(n, batch, seed), epoch)
    assert len(whole) == len(training(n, batch)) == steps
    for size in (1, 2, 4):
        parts = [values(training(n, batch, seed, rank, size), epoch) for rank in range(size)]
        assert [joined(slices) for slices in zip(*parts, strict=True)] == whole
        assert {len(part) for one in parts for part in one} == {batch // size}
    start = data.draw(st.integers(0, steps))
    assert values(training(n, batch, seed), epoch, start) == whole[start:]


@settings(deadline=None, max_examples=40)
@given(n=st.integers(8, 200), batch=st.integers(1, 8), seed=st.integers(0, 1000))
def test_every_sample_once_and_another_order_each_epoch(n: int, batch: int, seed: int) -> None:
    batches = training(n, batch, seed)
    seen = [int(x) for step in values(batches) for x in step]
    assert len(seen) == len(set(seen)) == n // batch * batch
    assert values(batches, 0) == values(batches, 0)
    assert values(batches, 0) != values(batches, 1)
    assert values(batches, 0) != values(training(n, batch, seed + 1), 0)


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 100), batch=st.integers(1, 10), size=st.sampled_from([1, 2, 3, 4]))
def test_evaluation_sees_each_sample_once_in_order_and_unaugmented(n: int, batch: int, size: int) -> None:
    parts = [
        GlobalBatches(
            Numbers(n),
            batch * size,
            world_rank=rank,
            world_size=size,
            seed=0,
            training=False,
        )
        for rank in range(size)
    ]
    seen = [x for part in parts for step in values(part) for x in step]
    assert sorted(seen) == list(range(n))
    assert all(a < b for part in parts for a, b in pairwise(joined(values(part))))
    counts = [len(joined(values(part))) for part in parts]
    assert max(counts) - min(counts) <= 1


def test_torch_generator_is_not_touched() -> None:
    before = torch.get_rng_state()
    values(training(40, 8))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_epochs_at_a_time_do_not_disturb_each_other() -> None:
    batches = training(40, 8)
    together = list(zip(batches.epoch(0), batches.epoch(1), strict=True))
    assert [one["x"].tolist() for one, _ in together] == values(batches, 0)
    assert [two["x"].tolist() for _, two in together] == values(batches, 1)


class Stubborn(Numbers):
    """Sends its own worker the signals that a job gets before its end."""

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            os.kill(os.getpid(), number)
        return super().gather(indices, rng)


def test_workers_give_the_same_batches_and_survive_signals() -> None:
    options = {"seed": 3, "training": True}
    workers = GlobalBatches(Stubborn(24), 4, num_workers=2, **options)
    assert values(workers, 1, 2) == values(GlobalBatches(Numbers(24), 4, **options), 1, 2)


def test_augmentation_is_the_same_for_any_world_size_and_in_a_subset() -> None:
    images = torch.randint(0, 256, (16, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator())
    whole = ImageArrays(images, torch.arange(16), mean=0.5, std=0.5, augment=FlipAndCrop(flip=True, padding=2))
    plain = ImageArrays(images, torch.arange(16), mean=0.5, std=0.5)

    def pixels(dataset: ArrayDataset, size: int, epoch: int) -> dict[int, Tensor]:
        found = {}
        for rank in range(size):
            batches = GlobalBatches(dataset, 8, world_rank=rank, world_size=size, seed=5, training=True)
            for batch in batches.epoch(epoch):
                found |= dict(zip(batch["labels"].tolist(), batch["pixel_values"], strict=True))
        return found

    alone, four, half = pixels(whole, 1, 0), pixels(whole, 4, 0), pixels(whole.take(8), 2, 0)
    assert sorted(alone) == list(range(16))
    assert sorted(half) == list(range(8))
    assert all(torch.equal(alone[i], four[i]) for i in alone)
    assert all(torch.equal(alone[i], half[i]) for i in half)
    later, unchanged = pixels(whole, 1, 1), pixels(plain, 1, 0)
    assert not all(torch.equal(alone[i], later[i]) for i in alone)
    assert not all(torch.equal(alone[i], unchanged[i]) for i in alone)


def test_take_and_subset_are_views() -> None:
    numbers = Numbers(10)
    assert len(numbers.take(3)) == 3
    assert len(numbers.take(99)) == 10
    picked = numbers.subset(torch.tensor([9, 7, 5])).take(2)
    assert picked.gather(torch.tensor([1, 0]))["x"].tolist() == [7.0, 9.0]


@pytest.mark.parametrize(
    ("n", "options", "message"),
    [
        (
            100,
            {"global_batch": 30, "world_size": 4},
            "global_batch is 30; must be a positive multiple of the world size, which is 4. Nearest that fits: 32.",
        ),
        (100, {"global_batch": 0}, "global_batch is 0; must be a positive multiple of the world size"),
        (20, {"global_batch": 32}, "global_batch is 32; must not exceed the 20 samples of the data set."),
        (0, {"global_batch": 4, "training": False}, "global_batch is 4; must not exceed the 0 samples"),
    ],
)
def test_bad_settings_are_named(n: int, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GlobalBatches(Numbers(n), **({"seed": 0, "training": True} | options))
    assert message in str(caught.value)


def test_batches_are_the_bits_they_always_were() -> None:
    """A change of the order or the augmentation would make every resumed run another one."""
    pixels = (torch.arange(40 * 3 * 6 * 5) * 2654435761 >> 8).to(torch.uint8).view(40, 3, 6, 5)
    images = ImageArrays(pixels, torch.arange(40), mean=0.5, std=0.25, augment=FlipAndCrop(flip=True, padding=2))
    splits = split_off(images, 9, images)
    digest = hashlib.sha256()
    batches = GlobalBatches(splits.train, 10, seed=2**64 - 5, training=True)
    for batch in batches.epoch(3, start=1):
        digest.update(batch["pixel_values"].numpy().tobytes() + batch["labels"].numpy().tobytes())
    assert splits.validation is not None
    digest.update(splits.validation.gather(torch.arange(9))["labels"].numpy().tobytes())
    digest.update(ResizedCrop().numbers(torch.arange(50), CounterRNG(7, 2)).numpy().tobytes())
    digest.update(str(split_documents([3 * i % 11 + 1 for i in range(50)], 0.1, 0.2)).encode())
    assert digest.hexdigest() == "cf7471b0e797acf4874678b581e475e10a5343f97abfbce3249e118d9f660a6d"


def image_splits() -> Splits:
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels, augment = torch.arange(40) % 10, FlipAndCrop(flip=True, padding=2)
    train = ImageArrays(images, labels, mean=0.5, std=(0.2, 0.3, 0.4), augment=augment)
    test = ImageArrays(images[:8].clone(), labels[:8].clone(), mean=0.5, std=(0.2, 0.3, 0.4))
    return split_off(train, 10, test)


def all_batches(part: ArrayDataset) -> list[Batch]:
    batches = GlobalBatches(part, 4, world_rank=1, world_size=2, seed=3, training=True, num_workers=1)
    return [batch for epoch in range(2) for batch in batches.epoch(epoch, 1)]


def test_samples_on_the_device_are_read_there(monkeypatch: pytest.MonkeyPatch) -> None:
    splits, meta = image_splits(), torch.device("meta")
    size = 48 * 3 * 64 + 48 * 8 + 40 * 8  # images and labels of both sets, and positions, each once
    monkeypatch.setattr("hpc_oialr.data.base.MOST_ON_DEVICE", size - 1)
    assert not splits.keep_on(torch.device("cpu"), "always")
    assert not splits.keep_on(meta, "auto")
    assert not splits.keep_on(meta, "never")
    assert not replace(splits, validation=Numbers(3)).keep_on(meta, "always")
    monkeypatch.setattr("hpc_oialr.data.base.MOST_ON_DEVICE", size)
    assert splits.keep_on(meta, "auto")
    assert splits.train.tensors()[0][2] is splits.validation.tensors()[0][2], "shared, as before"
    found = all_batches(splits.train)
    assert [{k: (v.shape, v.dtype) for k, v in batch.items()} for batch in found] == [
        {k: (v.shape, v.dtype) for k, v in batch.items()} for batch in all_batches(image_splits().train)
    ]
    assert all(value.is_meta for batch in found for value in batch.values())
