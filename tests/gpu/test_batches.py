"""Batches that come through pinned memory and loader processes are the batches that come without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpc_oialr.data.base import Batch, Splits
from hpc_oialr.data.batches import GlobalBatches
from hpc_oialr.data.image_arrays import FlipAndCrop, ImageArrays

pytestmark = pytest.mark.gpu


def moved(device: torch.device, workers: int, pinned: bool, made_on: str = "cpu") -> list[dict[str, Tensor]]:
    """Two epochs on the device, copied beside the computation as a training session does it, or made there."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (48, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(48) % 10
    dataset = ImageArrays(images, labels, mean=0.5, std=0.25, augment=FlipAndCrop(flip=True, padding=2))
    Splits(dataset, None, None).keep_on(torch.device(made_on), "auto")
    batches = GlobalBatches(dataset, 16, seed=3, training=True, num_workers=workers, pin_memory=pinned)
    found: list[Batch] = []
    for epoch in range(2):
        for batch in batches.epoch(epoch):
            assert all(value.is_pinned() is pinned for value in batch.values())
            found.append({key: value.to(device, non_blocking=True) for key, value in batch.items()})
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_are_the_same(workers: int, device: torch.device) -> None:
    plain = moved(torch.device("cpu"), 0, False)
    there = moved(device, workers, device.type == "cuda")
    assert len(plain) == len(there) == 6
    for ours, theirs in zip(there, plain, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].device.type == device.type
            assert torch.equal(ours[key].cpu(), theirs[key])


def test_batches_made_on_the_device_have_the_same_bits(device: torch.device) -> None:
    plain, there = moved(torch.device("cpu"), 0, False), moved(device, 2, False, device.type)
    for ours, theirs in zip(there, plain, strict=True):
        assert all(value.device.type == device.type for value in ours.values())
        assert all(torch.equal(ours[key].cpu(), theirs[key]) for key in theirs)
