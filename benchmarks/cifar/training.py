"""One training on the device, with clocks that stop for evaluations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cifar.images import CLASSES, SIDE, Batches, Images, normalised
from benchmarks.cifar.variants import Line, Variant
from benchmarks.clock import Clock
from hpc_oialr import OIALR, dense_parameters, muon_adamw, trainable_parameters
from hpc_oialr.models import ViT
from hpc_oialr.record.memory import MemoryMeter
from hpc_oialr.train.cuda_graph import GraphedStep
from hpc_oialr.train.schedules import LearningRates, WarmupCosine

Row = dict[str, Any]

# Steps before the conversion whose memory is probed on a CPU: optimizer state exists from the first on.
PROBED = (2,)


def train(variant: Variant, images: Images, seed: int, *, evaluations: int = 10) -> Row:
    """Train one variant and judge it ``evaluations`` times on the way.

    Parameters
    ----------
    variant
        Its epochs and batch set.
    images
        On the device that trains.
    seed
        Of weights, order, crops and flips.

    Returns
    -------
    ``accuracy`` at the end; ``train_s`` and ``cpu_s``, wall and processor seconds of training without evaluations;
    ``curve`` with both at every evaluation; ``before_conversion`` and ``after_conversion``; ``trained_share``; ``r`` by
    layer; ``peak_memory_gib`` of tensors; ``update_s`` of all SVDs and updates.
    """
    run = _Run(variant, images, seed)
    marks = {round((i + 1) * run.steps / evaluations) for i in range(evaluations)}
    with run.clock.running():
        for epoch in range(math.ceil(run.steps / run.batches.steps_an_epoch)):
            for pixels, labels in run.batches.epoch():
                if run.done == run.steps:
                    break
                run.step(pixels, labels)
                if run.done in marks:
                    run.note(epoch)
    return run.row()


class _Run:
    """Model, optimizer, controller and counters of one training."""

    def __init__(self, variant: Variant, images: Images, seed: int) -> None:
        assert variant.batch is not None
        assert variant.epochs is not None
        self.variant, self.images, self.seed = variant, images, seed
        self.device = images.train_images.device
        self.batches = Batches(images, variant.batch, seed)
        self.steps = max(1, round(variant.epochs * self.batches.steps_an_epoch))
        model = _model(images, seed).to(self.device)
        self.dense_parameters = dense_parameters(model)
        self.optimizer = _optimizer(variant, model)
        self.rates = LearningRates(
            self.optimizer, lambda step: WarmupCosine(warmup=variant.warmup).factor(step, self.steps)
        )
        self.plain, self.oialr, self.rule = model, None, None
        if variant.low_rank:
            config, self.rule = variant.oialr(self.steps, images.size.dim)
            self.oialr = OIALR(model, self.optimizer, config)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=variant.label_smoothing)
        self.clock = Clock(self.device)
        self.memory = MemoryMeter(lambda: (self.plain, self.optimizer), self.device)
        cuda = self.device.type == "cuda"
        self.graph = GraphedStep(
            self.compute,
            model,
            self.device,
            eager=lambda: self.oialr is not None and bool(self.oialr.gathered),
            refusal="" if cuda else "it needs a GPU",
        )
        self.rates.device = self.device if cuda else None
        self.done, self.update_s, self.loss = 0, 0.0, torch.zeros((), device=self.device)
        self.curve: list[Row] = []
        self.at_conversion: Row = {}

    @property
    def model(self) -> nn.Module:
        return self.oialr.model if self.oialr is not None else self.plain

    def step(self, pixels: Tensor, labels: Tensor) -> None:
        """One step and what the method does after it; nothing here waits for a GPU but a conversion or update."""
        converts = self.oialr is not None and self.done + 1 == self.oialr.config.delay
        self.rates.set(self.done)
        config = None if self.oialr is None else self.oialr.config
        # The optimizer has state from the second step of a phase on.
        starts = [] if config is None else [config.delay, *(start + 1 for start, _ in config.free_phases)]
        probed = self.device.type == "cpu" and self.done in [*PROBED, *starts]
        batch = {"pixel_values": pixels, "labels": labels}
        with self._probe() if probed else nullcontext():
            self.loss = self.graph(batch)
        self.done += 1
        if self.oialr is None:
            return
        if converts:
            with self.clock.paused():
                self.at_conversion["before_conversion"] = self.judge()
        if isinstance(self.rule, Line):
            begin, end = (share * self.steps for share in (self.variant.delay, self.variant.until))
            self.rule.progress = (self.done - begin) / (end - begin)
        report = self.oialr.step()
        if report is not None and report.reshaped:
            self.graph.forget()
        self.update_s += 0.0 if report is None else report.seconds
        if converts:
            with self.clock.paused():
                self.at_conversion["after_conversion"] = self.judge()

    def compute(self, batch: dict[str, Tensor]) -> Tensor:
        """Forward, backward, optimizer: what a CUDA graph holds on a GPU; returns the loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self.criterion(self.model(pixel_values=batch["pixel_values"]).logits, batch["labels"])
        loss.backward()
        if self.variant.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.variant.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @contextmanager
    def _probe(self) -> Iterator[None]:
        """Measure a step's memory with the clocks stopped: the probe takes longer than the step."""
        with self.clock.paused(), self.memory.probe():
            yield

    @torch.no_grad()
    def judge(self) -> float:
        """Accuracy on the images to judge by."""
        model, size = self.model.eval(), 2000 if self.device.type == "cuda" else 500
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for start in range(0, len(self.images.test_labels), size):
            pixels = normalised(self.images.test_images[start : start + size])
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                guess = model(pixel_values=pixels).logits.argmax(1)
            right += (guess == self.images.test_labels[start : start + size]).sum()
        model.train()
        return float(right) / len(self.images.test_labels)

    def note(self, epoch: int) -> None:
        """One point of the curve."""
        with self.clock.paused():
            self.curve.append({
                "step": self.done,
                "epoch": round(self.done / self.batches.steps_an_epoch, 3),
                "train_s": round(self.clock.wall, 2),
                "cpu_s": round(self.clock.cpu, 2),
                "loss": round(float(self.loss), 4),
                "accuracy": self.judge(),
            })  # fmt: skip

    def row(self) -> Row:
        """The finished run."""
        assert self.variant.epochs is not None
        values: Mapping[str, Any] = {
            "run": self.variant.name,
            "seed": self.seed,
            "size": self.images.size.name,
            "judged_on": self.images.judge,
            "epochs": self.variant.epochs,
            "batch": self.variant.batch,
            "steps": self.steps,
            "accuracy": self.curve[-1]["accuracy"],
            "train_s": self.clock.wall,
            "cpu_s": self.clock.cpu,
            "update_s": self.update_s,
            "before_conversion": self.at_conversion.get("before_conversion"),
            "after_conversion": self.at_conversion.get("after_conversion"),
            "trained_share": trainable_parameters(self.plain) / self.dense_parameters,
            "peak_memory_gib": self.memory.peak_bytes / 2**30,
            "r": self.oialr.r if self.oialr is not None else {},
            "curve": self.curve,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "settings": self.variant.settings(),
        }
        return dict(values)


def _model(images: Images, seed: int) -> nn.Module:
    size = images.size
    settings = ViT(
        image_size=SIDE,
        patch_size=size.patch,
        dim=size.dim,
        depth=size.depth,
        heads=size.heads,
        classes=CLASSES,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return settings.build({"pixel_values": torch.zeros(1, 3, SIDE, SIDE)})


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """torch's for all that is trained, matrices with weight decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, fused=True, capturable=parameters[0].is_cuda)


def _optimizer(variant: Variant, model: nn.Module) -> torch.optim.Optimizer:
    if variant.optimizer == "adamw":
        return adamw(model, variant.lr, variant.weight_decay)
    return muon_adamw(
        model,
        lr=variant.lr,
        core_lr=variant.core_lr,
        bases_lr=None if variant.free_from is None else variant.bases_lr or variant.lr,
        adamw_lr=variant.rest_lr,
        dense_algorithm="muon" if variant.optimizer == "muon" else "adamw",
        weight_decay=variant.weight_decay,
    )
