"""A few made-up images as a data set of one's own, chosen by its full path."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hpc_oialr.data import DataConfig, Splits
from hpc_oialr.data.image_arrays import ImageArrays


@dataclass(frozen=True, kw_only=True)
class TinyImages(DataConfig):
    """Images whose brighter half is their class."""

    count: int = 64
    limit: int | None = None

    def _load(self) -> Splits:
        train, validation, test = (self._images(seed) for seed in (0, 1, 2))
        return Splits(train, validation, test)

    def _images(self, seed: int) -> ImageArrays:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 100, (self.count, 1, 8, 8), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 2, (self.count,), generator=generator)
        for image, label in zip(images, labels, strict=True):
            image[:, :4] += 100 * (1 - label).to(torch.uint8)
            image[:, 4:] += 100 * label.to(torch.uint8)
        return ImageArrays(images, labels, mean=0.4, std=0.2)


RECIPE = {
    "data": {"class_path": "support.tiny_images.TinyImages"},
    "model": {
        "class_path": "ViT",
        "init_args": {
            "image_size": 8, "patch_size": 4, "channels": 1, "dim": 16, "depth": 1, "heads": 2, "classes": 2
        },
    },
    "task": {"class_path": "Classification"},
    "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.005}},
    "oialr": {"delay": 4, "frequency": 3, "limits": {"at_conversion": 0.75, "round_to": 1}, "layer_share_step": 1.0},
    "train": {"steps": 12, "global_batch": 16, "evaluations": 3, "device": "cpu"},
    "dense": {"train": {"steps": 8}},
}  # fmt: skip
