"""Trained models side by side on their own data: metrics, size, memory, latency, throughput."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hpc_oialr.data import ArrayDataset, Batch, GlobalBatches
from hpc_oialr.distributed import World, launch_info
from hpc_oialr.errors import ConfigError, DataError, OIALRError
from hpc_oialr.lowrank import low_rank_layers, merge, untied_state
from hpc_oialr.lowrank.folded import fold
from hpc_oialr.record import RunFolder, environment_report
from hpc_oialr.record.memory import MemoryMeter, resident_bytes
from hpc_oialr.serve.trained import checkpoint_of, load_model
from hpc_oialr.train.config import RunConfig
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.passes import INPUTS, Passes
from hpc_oialr.train.process_settings import process_settings
from hpc_oialr.train.run_context import wants_channels_last

WARM_UP = 3  # passes that are not timed: kernels are chosen, memory is allocated


@dataclass(frozen=True)
class Contender:
    """One model in one form: "dense" as it was trained, "merged" or "factored" of a low-rank run."""

    run: Path
    step: int
    form: str
    module: nn.Module
    passes: Passes

    @torch.inference_mode()
    def __call__(self, config: RunConfig, batch: Batch) -> Tensor:
        """The answer to a batch that is on the device."""
        with self.passes.autocast():
            return config.task.predict(self.module, batch)


def evaluate_runs(
    paths: Sequence[Path],
    *,
    settings: Sequence[str] = (),
    step: int | None = None,
    split: str | None = None,
    batches: Sequence[int] = (1, 32),
    repeats: int = 20,
    device: str | None = None,
) -> dict[str, Any]:
    """Evaluate checkpoints, by default each run's last, all forms of all runs on the first run's data.

    Parameters
    ----------
    paths
        Folders of runs, of checkpoints (``RUN/checkpoints/step_00000123``), or of ``oialr compare``.
    settings
        As on the command line, of the data and of the passes only, e.g. ``["--data.path", "FOLDER"]``.
    split
        "test" or "validation"; default the first of them that the data have.
    batches
        Sizes of batches that are timed. All models answer one after the other, ``repeats`` times, so that drifts of the
        machine's speed meet all of them.

    Returns
    -------
    dict
        Plain values: ``models`` has an entry for each form. Times are medians with 10th and 90th percentile, in ms;
        ``time_ratio`` is the median over the repeats of the time over the first model's in the same round.

    Raises
    ------
    OIALRError
        If a run has no such checkpoint, tasks differ, the data lack the split, or several processes were started.
    """
    if launch_info().size > 1:
        raise OIALRError("oialr eval measures one process; start it without a launcher.")
    if min(*batches, repeats, 1) < 1:
        raise ConfigError("batches", list(batches), "must, like repeats, be at least 1")
    found = [checkpoint_of(path, step) for path in _expand(paths)]
    configs = [_config(run, settings if i == 0 else ()) for i, (run, _) in enumerate(found)]
    config, tasks = configs[0], {type(each.task).__name__ for each in configs}
    if len(tasks) > 1:
        raise DataError(f"the runs have different tasks: {', '.join(sorted(tasks))}. Evaluate each by itself.")
    world = World.single(device or config.train.device)
    splits = config.data.build()
    split = split or ("test" if splits.test is not None else "validation")
    dataset: ArrayDataset | None = getattr(splits, split)
    if dataset is None:
        raise DataError(f"the data of {paths[0]} have no {split} part; choose the other one: --split.")
    with ExitStack() as stack:
        stack.enter_context(process_settings(world, tf32=config.train.tf32))
        models = [each for run, at in found for each in contenders(run, at, config, dataset, world.device)]
        rows = [_row(each) for each in models]
        for each, row in zip(models, rows, strict=True):
            stack.enter_context(each.passes.casts(each.module))
            row["metrics"] = metrics_of(each, config, dataset)
            row["peak_memory_batch"] = max(batches)
            row["peak_memory_bytes"] = _peak_bytes(each, config, _batch(each, dataset, max(batches)))
        for row, speed in zip(rows, _speeds(models, config, dataset, batches, repeats), strict=True):
            row["speed"] = speed
    return {
        "task": type(config.task).__name__,
        "data": type(config.data).__name__,
        "split": split,
        "samples": len(dataset),
        "unit": config.task.unit,
        "metric": config.task.metric,
        "precision": config.train.precision,
        "device": str(world.device),
        "repeats": repeats,
        "models": rows,
        "environment": environment_report(),
    }


def _expand(paths: Iterable[Path]) -> Iterator[Path]:
    """Both sides of a folder of ``oialr compare``, the dense one first; other paths as they are."""
    for path in paths:
        sides = [path / "dense", path / "oialr"]
        both = not RunFolder(path).holds_run and all(RunFolder(side).holds_run for side in sides)
        yield from sides if both else [path]


def _config(run: Path, settings: Sequence[str]) -> RunConfig:
    for name in (word[2:].partition("=")[0] for word in settings if word.startswith("--")):
        if name.partition(".")[0] not in ("data", "train"):
            rule = "cannot be set for a trained model; settings of data and train can"
            raise OIALRError(f"--{name} {rule}, e.g. --train.precision bf16.")
    return load_config(run / "config.yaml", settings).config


def contenders(
    run: Path, step: int, config: RunConfig, dataset: ArrayDataset, device: torch.device
) -> Iterator[Contender]:
    """The forms of one checkpoint: "dense" if no layer is low-rank, else "merged" and "factored"."""
    module = load_model(run, step=step)
    forms = {"dense": module}
    if low_rank_layers(module):
        forms = {"merged": merge(module), "factored": fold(module, inplace=True)}
    sample, dtype = dataset.example(1), INPUTS.get(config.train.precision)
    for form, each in forms.items():
        last = wants_channels_last(config, each, sample, device)
        each.to(device, torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_(False).eval()
        yield Contender(run, step, form, each, Passes(device, config.train.precision, last))


@torch.inference_mode()
def metrics_of(model: Contender, config: RunConfig, dataset: ArrayDataset) -> dict[str, float]:
    """Loss and metrics of the task over a data set."""
    train = config.train
    batches = GlobalBatches(dataset, train.evaluation_batch, seed=train.seed, training=False, num_workers=train.workers)
    parts = []
    for batch in batches.epoch(0):
        with model.passes.autocast():
            parts.append(config.task.totals(model.module, model.passes.place(batch, dataset)))
    return config.task.metrics(torch.stack(parts).sum(0).cpu())


def _row(model: Contender) -> dict[str, Any]:
    return {
        "run": str(model.run),
        "step": model.step,
        "form": model.form,
        "parameters": sum(parameter.numel() for parameter in model.module.parameters()),
        "file_bytes": _file_bytes(untied_state(model.module)),
    }


def _file_bytes(state: dict[str, Tensor]) -> int:
    """Size of a safetensors file of these tensors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, path)
        return path.stat().st_size


def _peak_bytes(model: Contender, config: RunConfig, batch: Batch) -> int:
    """The most that tensors hold in a forward pass, the model's included, without those of other models."""
    device = model.passes.device
    model(config, batch)
    meter = MemoryMeter(lambda: (model.module,), device)
    others = torch.cuda.memory_allocated(device) - resident_bytes(model.module) if device.type == "cuda" else 0
    with meter.probe():
        model(config, batch)
    return meter.peak_bytes - others


def _batch(model: Contender, dataset: ArrayDataset, size: int) -> Batch:
    """The first samples, again from the start where there are fewer."""
    return model.passes.place(dataset.gather(torch.arange(size) % len(dataset)), dataset)


def _speeds(
    models: Sequence[Contender], config: RunConfig, dataset: ArrayDataset, batches: Sequence[int], repeats: int
) -> list[list[dict[str, float]]]:
    """For each model one entry a batch size."""
    speeds: list[list[dict[str, float]]] = [[] for _ in models]
    for size in batches:
        inputs = [_batch(model, dataset, size) for model in models]
        units = config.task.count(inputs[0])
        pairs = list(zip(models, inputs, strict=True))
        for _ in range(WARM_UP):
            for model, batch in pairs:
                model(config, batch)
        rounds = np.array([[_seconds(model, config, batch) for model, batch in pairs] for _ in range(repeats)])
        for i, own in enumerate(rounds.T):
            low, median, high = np.percentile(own, (10, 50, 90))
            speeds[i].append({
                "batch": size,
                "median_ms": 1e3 * median,
                "p10_ms": 1e3 * low,
                "p90_ms": 1e3 * high,
                "units_per_s": units / median,
                "time_ratio": float(np.median(own / rounds[:, 0])),
            })  # fmt: skip
    return speeds


def _seconds(model: Contender, config: RunConfig, batch: Batch) -> float:
    """Of one forward pass, until its answer is there."""
    device = model.passes.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    model(config, batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
