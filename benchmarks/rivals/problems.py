"""The problems: a model of the package, data that lie on the device, a loss, and a metric of data held out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from benchmarks.cifar.images import MEAN, STD
from benchmarks.cifar.images import load as load_cifar
from hpc_oialr.data import ETT, ArrayDataset, Batch, CounterRNG, FashionMNIST, FlipAndCrop, GlobalBatches, TextFolder
from hpc_oialr.data.base import Splits
from hpc_oialr.data.image_arrays import ImageArrays
from hpc_oialr.data.text import ByteSequences
from hpc_oialr.models import GPT2, Autoformer, ModelConfig, ResNet, ViT
from hpc_oialr.train.tasks import Classification, Forecasting, LanguageModelling, Task

Judged = Literal["test", "validation", "made-up data"]
HORIZON, VARIABLES, TIME_FEATURES = 96, 7, 5
# Samples of made-up data that train, and that judge.
TINY = (32, 16)


class Tensors(ArrayDataset):
    """Samples as tensors of equal length, by name; batches are made where these are."""

    def __init__(self, samples: Batch) -> None:
        self.movable = tuple(samples)  # type: ignore[misc]
        vars(self).update(samples)

    def __len__(self) -> int:
        return len(getattr(self, self.movable[0]))

    def gather(self, indices: Tensor, rng: CounterRNG | None = None) -> Batch:
        """Samples at ``indices``, of each tensor."""
        return {name: getattr(self, name).index_select(0, indices.to(self.device)) for name in self.movable}


@dataclass(frozen=True)
class Problem:
    """What all sides of a comparison share.

    Attributes
    ----------
    model, tiny
        The model, and a small one for tests.
    load
        Data by folder (None: the package's cache) and what judges.
    batch, steps
        Samples of a step; steps of the reference length.
    adamw_lr, muon_lr, rest_lr
        Base rates of AdamW, of Muon, and of AdamW for what Muon leaves; sides are tuned by multiples of them.
    metric, higher_is_better
        Of :meth:`judge`.
    judged
        At most so many samples, the first ones.
    autocast
        On a GPU: bf16.
    clip
        Bound on the gradient's norm, or None.
    """

    name: str
    title: str
    task: Task
    model: ModelConfig
    tiny: ModelConfig
    load: Callable[[Path | None, Judged], Splits]
    batch: int
    steps: int
    adamw_lr: float
    muon_lr: float
    metric: str
    higher_is_better: bool
    rest_lr: float = 1e-3
    judged: int = 10_000
    weight_decay: float = 0.05
    autocast: bool = True
    clip: float | None = None

    def better(self, value: float, other: float) -> bool:
        """Whether one value of the metric is better than another."""
        return value > other if self.higher_is_better else value < other


class Data:
    """Training and judging data of a problem on one device."""

    def __init__(self, problem: Problem, folder: Path | None, judged: Judged, device: torch.device) -> None:
        splits = problem.load(folder, judged)
        splits.keep_on(device, "always")
        part = splits.validation if judged == "validation" else splits.test
        assert part is not None
        self.problem, self.device, self.judged, self.train = problem, device, judged, splits.train
        self._judging = part.take(problem.judged)
        self._autocast = problem.autocast and device.type == "cuda"

    def model(self, seed: int) -> nn.Module:
        """The dense model at its start."""
        problem = self.problem
        settings = problem.tiny if self.judged == "made-up data" else problem.model
        example = {name: value.cpu() for name, value in self.train.gather(torch.arange(2)).items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return settings.build(example).to(self.device)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches without end."""
        size = min(self.problem.batch, len(self.train) // 2)
        batches = GlobalBatches(self.train, size, seed=seed, training=True)
        for epoch in count():
            for batch in batches.epoch(epoch):
                yield {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Training loss of a batch; its tasks draw no random numbers."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            return self.problem.task.loss(model, batch, None)  # type: ignore[arg-type]

    @torch.no_grad()
    def judge(self, model: nn.Module) -> float:
        """The metric on the data held out."""
        model.eval()
        totals: list[Tensor] = []
        size = 1000 if self.device.type == "cuda" else 250
        for batch in GlobalBatches(self._judging, size, seed=0, training=False).epoch(0):
            moved = {name: value.to(self.device) for name, value in batch.items()}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
                totals.append(self.problem.task.totals(model, moved))
        model.train()
        return self.problem.task.metrics(torch.stack(totals).sum(0).cpu())[self.problem.metric]


def _made_images(channels: int, side: int) -> Splits:
    """Noise of ten brightnesses, which a model can learn."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for size in TINY:
        labels = torch.arange(size) % 10
        noise = torch.randint(0, 30, (size, channels, side, side), generator=generator)
        parts.append(ImageArrays((noise + 20 * labels[:, None, None, None]).byte(), labels, mean=0.5, std=0.3))
    return Splits(parts[0], parts[1], parts[1], 10)


def fashion(folder: Path | None, judged: Judged) -> Splits:
    """Fashion-MNIST; 5,000 training images are never trained on."""
    if judged == "made-up data":
        return _made_images(1, 28)
    given = folder is not None and (folder / "fashion-mnist").is_dir()
    return FashionMNIST(data_dir=str(folder) if given else None, validation=5000).build()


def cifar(folder: Path | None, judged: Judged) -> Splits:
    """10,000 images of CIFAR-10, cropped and flipped; ``folder`` holds the archives."""
    if judged == "made-up data":
        return _made_images(3, 32)
    if folder is None:
        raise FileNotFoundError("CIFAR-10 needs --data FOLDER with its archives; python -m benchmarks.cifar --help")
    images = load_cifar(folder, "small", validation=judged == "validation")
    augment = FlipAndCrop(flip=True, padding=4)
    train = ImageArrays(images.train_images, images.train_labels, mean=MEAN, std=STD, augment=augment)
    part = ImageArrays(images.test_images, images.test_labels, mean=MEAN, std=STD)
    return Splits(train, part, part, 10)


def text(folder: Path | None, judged: Judged) -> Splits:
    """Bytes of the Python documentation, split by document."""
    if judged == "made-up data":
        generator = torch.Generator().manual_seed(0)
        parts = [ByteSequences(torch.randint(97, 101, (32 * n,), generator=generator).byte(), 32) for n in TINY]
        return Splits(parts[0], parts[1], parts[1], 256)
    given = folder is not None and (folder / "python-docs").is_dir()
    return TextFolder(path=str(folder / "python-docs") if folder and given else None, sequence_length=128).build()


def etth1(folder: Path | None, judged: Judged) -> Splits:
    """ETTh1 with the published split; all windows as tensors."""
    if judged == "made-up data":
        generator = torch.Generator().manual_seed(0)
        shapes = {"values": VARIABLES, "time_features": TIME_FEATURES}
        parts = []
        for size in TINY:
            samples = {
                f"{when}_{name}": torch.randn(size, HORIZON, width, generator=generator)
                for name, width in shapes.items()
                for when in ("past", "future")
            }
            seen = torch.ones(size, HORIZON, VARIABLES)
            parts.append(Tensors({**samples, "past_observed_mask": seen, "future_observed_mask": seen.clone()}))
        return Splits(parts[0], parts[1], parts[1])
    path = None if folder is None else str(folder)
    splits = ETT(dataset="etth1", path=path, context_length=96, horizon=HORIZON, lags_sequence=(0,)).build()
    assert splits.validation is not None
    assert splits.test is not None
    train, validation, test = (
        Tensors({name: t.contiguous() for name, t in part.gather(torch.arange(len(part))).items()})
        for part in (splits.train, splits.validation, splits.test)
    )
    return Splits(train, validation, test)


def _autoformer(dim: int, mlp_dim: int) -> Autoformer:
    return Autoformer(
        dim=dim, encoder_layers=2, decoder_layers=1, heads=4, mlp_dim=mlp_dim, lags=(0,), scaling="none",
        initial="published", moving_average=25, label_length=48, dropout=0.05,
    )  # fmt: skip


PROBLEMS = {
    problem.name: problem
    for problem in (
        Problem(
            "fashion_vit", "ViT (dim 512, depth 2) on Fashion-MNIST", Classification(label_smoothing=0.1),
            ViT(image_size=28, patch_size=14, channels=1, dim=512, depth=2, heads=8, classes=10),
            ViT(image_size=28, patch_size=14, channels=1, dim=32, depth=1, heads=2, classes=10),
            fashion, batch=128, steps=300, adamw_lr=5e-4, muon_lr=0.005,
            metric="accuracy", higher_is_better=True,
        ),
        Problem(
            "fashion_conv", "ResNet (64, 128, 256 filters) on Fashion-MNIST", Classification(label_smoothing=0.1),
            ResNet(image_size=28, channels=1, stem=32, dims=(64, 128, 256), depths=(2, 2, 2), block="basic", classes=10),
            ResNet(image_size=28, channels=1, stem=8, dims=(16, 32), depths=(1, 1), block="basic", classes=10),
            fashion, batch=64, steps=400, adamw_lr=1e-3, muon_lr=0.01,
            metric="accuracy", higher_is_better=True,
        ),
        Problem(
            "cifar_vit", "ViT (dim 192, depth 4) on 10,000 images of CIFAR-10", Classification(label_smoothing=0.1),
            ViT(image_size=32, patch_size=8, channels=3, dim=192, depth=4, heads=4, classes=10),
            ViT(image_size=32, patch_size=8, channels=3, dim=32, depth=1, heads=2, classes=10),
            cifar, batch=128, steps=400, adamw_lr=5e-4, muon_lr=0.005,
            metric="accuracy", higher_is_better=True, judged=5000,
        ),
        Problem(
            "text_gpt", "GPT-2 (dim 256, depth 4) on bytes of the Python documentation", LanguageModelling(),
            GPT2(dim=256, depth=4, heads=4), GPT2(dim=32, depth=1, heads=2),
            text, batch=16, steps=400, adamw_lr=1e-3, muon_lr=0.01, weight_decay=0.01,
            metric="loss", higher_is_better=False, judged=1024, clip=1.0,
        ),
        Problem(
            "etth1", "Autoformer (dim 64) on ETTh1, 96 hours ahead", Forecasting(objective="mse"),
            _autoformer(64, 256), _autoformer(16, 32),
            etth1, batch=32, steps=300, adamw_lr=1e-3, muon_lr=0.003, weight_decay=0.01,
            metric="mse", higher_is_better=False, autocast=False,
        ),
    )
}  # fmt: skip
