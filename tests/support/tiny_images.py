"""A few made-up images as a data set of one's own, chosen by its full path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_oialr.data import DataConfig, Splits
from hpc_oialr.data.image_arrays import ImageArrays
from hpc_oialr.lowrank import low_rank_layers
from hpc_oialr.plan.scripted_run import ScriptedRun
from hpc_oialr.train.run_context import RunContext


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

# On top of it: convolutions.
RESNET = {
    "model": {
        "class_path": "ResNet",
        "init_args": {
            "image_size": 8, "channels": 1, "stem": 8, "dims": [16], "depths": [1], "block": "basic", "classes": 2
        },
    },
    "train": {"channels_last": "on"},
    "checkpoint": {"every": 5},
}  # fmt: skip


def require_channels_last(context: RunContext) -> None:
    """All convolutions of a run give results with their channels last: dense, converted and cut; weights do not."""
    run, seen = ScriptedRun(context), set()

    def look(layer: nn.Module, inputs: Any, output: Tensor) -> None:
        seen.add(output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous())

    convolutions = [module for module in context.module.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) > 3
    for layer in convolutions:
        layer.register_forward_hook(look)
    for change in (None, run.convert, run.update):
        samples = run.samples(4)
        if change is not None:
            run.train(samples)
            change()
        seen.clear()
        run.train(samples)
        assert seen == {True}
        assert all(p.is_contiguous() for p in context.module.parameters())
    assert len(low_rank_layers(context.module)) >= 2
