"""The models whose steps and updates are measured; random weights, nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from hpc_oialr import OIALR, OIALRConfig, Selection, low_rank_layers
from hpc_oialr.models import GPT2, Llama, ViT
from hpc_oialr.train.tasks import LanguageModelling

Batch = dict[str, Tensor]


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """What the model computes from its labels."""
    loss: Tensor = model(**batch).loss
    return loss


def task_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The package's loss of a language model: by chunks of the logits where the vocabulary is large."""
    return LanguageModelling().loss(model, batch, np.random.default_rng(0))


@dataclass(frozen=True)
class Workload:
    """A model and its batch.

    Attributes
    ----------
    samples
        Images, or sequences, a step.
    tokens
        Tokens a step.
    selection
        As in the model's recipe.
    loss
        The model's own, or that of the package's task.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    samples: int
    tokens: int
    selection: Selection
    loss: Callable[[nn.Module, Batch], Tensor] = own_loss


def workloads(*, tiny: bool) -> dict[str, Workload]:
    """The models by name: in their size, or as small as they can be."""
    found = _tiny() if tiny else _full()
    return {workload.name: workload for workload in found}


def _full() -> tuple[Workload, ...]:
    first_and_last = Selection(keep_first=True, keep_last=True, max_aspect=10)
    return (
        _vit("ViT-B/16", ViT(), 256, first_and_last),
        _vit(
            "mini ViT",
            ViT(image_size=32, patch_size=8, dim=768, depth=6, heads=6, classes=10),
            1024,
            Selection(),
        ),
        _gpt2("GPT-2 124M", GPT2(vocabulary=50257), 16, 1024),
        _llama("Llama-like 350M", Llama(dim=2048, depth=8, heads=16, mlp_dim=4096, vocabulary=8192), 8, 2048),
    )


def _tiny() -> tuple[Workload, ...]:
    small = ViT(image_size=16, patch_size=8, dim=32, depth=2, heads=2, classes=4)
    return (
        _vit("ViT-B/16", small, 4, Selection(keep_first=True)),
        _vit("mini ViT", small, 4, Selection()),
        _gpt2("GPT-2 124M", GPT2(dim=32, depth=2, heads=2, vocabulary=32), 2, 8),
        _llama("Llama-like 350M", Llama(dim=32, depth=2, heads=2, mlp_dim=64, vocabulary=32), 2, 8),
    )


def _vit(name: str, config: ViT, batch: int, selection: Selection) -> Workload:
    def images() -> Batch:
        pixels = torch.randn(batch, config.channels, config.image_size, config.image_size)
        return {"pixel_values": pixels, "labels": torch.randint(config.classes, (batch,))}

    def build() -> nn.Module:
        return config.build({"pixel_values": torch.empty(1, config.channels, config.image_size, config.image_size)})

    tokens = batch * (1 + (config.image_size // config.patch_size) ** 2)
    return Workload(name, build, images, batch, tokens, selection)


def _text(batch: int, length: int, vocabulary: int) -> Callable[[], Batch]:
    def text() -> Batch:
        tokens = torch.randint(vocabulary, (batch, length))
        return {"input_ids": tokens, "labels": tokens}

    return text


def _gpt2(name: str, config: GPT2, batch: int, length: int) -> Workload:
    def build() -> nn.Module:
        return config.build({"input_ids": torch.empty(1, length, dtype=torch.long)})

    text = _text(batch, length, config.vocabulary)
    return Workload(name, build, text, batch, batch * length, Selection(), loss=task_loss)


def _llama(name: str, config: Llama, batch: int, length: int) -> Workload:
    def build() -> nn.Module:
        return config.build({"input_ids": torch.empty(1, length, dtype=torch.long)})

    return Workload(name, build, _text(batch, length, config.vocabulary), batch, batch * length, Selection())


def on_device(workload: Workload, device: torch.device) -> nn.Module:
    """The model with its weights drawn on the device, which takes a fraction of a second there."""
    torch.manual_seed(0)
    with torch.device(device):
        return workload.build().train()


def batch_on(workload: Workload, device: torch.device) -> Batch:
    """A batch on the device."""
    return {key: value.to(device) for key, value in workload.batch().items()}


def to_low_rank(model: nn.Module, optimizer: torch.optim.Optimizer, fraction: float, selection: Selection) -> OIALR:
    """The controller of the model at ``r = fraction k``, its factors random: for times an SVD of each weight is idle.

    Bases are nearly orthonormal, cores diagonal plus noise, as after some steps.
    """
    oialr = OIALR(model, optimizer, OIALRConfig(delay=0, frequency=10**9, selection=selection))
    r = {target.name: max(1, round(fraction * target.k)) for target in oialr.targets}
    oialr.load_state_dict({"t": 1, "updates": 0, "r": r, "streaks": {}})
    with torch.no_grad():
        for layer in low_rank_layers(model).values():
            U, Vh = (torch.randn_like(t) for t in (layer.U, layer.Vh))
            S = torch.diag(torch.linspace(1, 0.1, layer.r)).to(layer.S) + 0.1 * torch.randn_like(layer.S) / layer.r**0.5
            layer.set_factors(U / layer.m**0.5, S, Vh / layer.n**0.5)
    return oialr
