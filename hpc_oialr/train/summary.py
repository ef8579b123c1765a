"""What a finished run comes down to: ``summary.json``."""

from __future__ import annotations

from typing import Any

from hpc_oialr.lowrank import dense_parameters, trainable_parameters
from hpc_oialr.lowrank.base import whole_shape
from hpc_oialr.record import peak_rss_bytes
from hpc_oialr.torch_compat import graphs_compiled
from hpc_oialr.train.fingerprint import weights_sha256
from hpc_oialr.train.trainer import Trainer


def summarise(trainer: Trainer) -> dict[str, Any]:
    """Evaluate on the test set, or on the validation set if there is no test set, and sum up the run.

    A collective call; the same on all processes but for times and memory. ``trainable_params`` is the
    count at the end, ``dense_trainable_params`` the dense twin's.
    """
    context, progress = trainer.context, trainer.progress
    final = _final_metrics(trainer)
    module, seconds = context.module, trainer.timers.state_dict()
    units = progress.step * context.units_per_step
    first = trainer.first_graphs
    return {
        "model": context.identity["class"],
        "metric": final["metric"],
        "metric_name": final["metric_name"],
        "best_metric": progress.best_metric,
        "wall_s": seconds["wall"],
        "update_wall_s": seconds["update"],
        "data_wait_s": seconds["data_wait"],
        "eval_wall_s": seconds["eval"],
        "checkpoint_wall_s": seconds["checkpoint"],
        f"{context.config.task.unit}_per_s": units / seconds["wall"] if seconds["wall"] else 0.0,
        "steps": progress.step,
        "trainable_params": trainable_parameters(module),
        "dense_trainable_params": dense_parameters(module),
        "total_params": sum(whole_shape(p).numel() for p in module.parameters()),
        "peak_memory_gib": trainer.recorder.peak_memory_gib(progress.peak_memory_gib),
        "peak_rss_gib": peak_rss_bytes() / 1024**3,
        "r": context.controller.r,
        "recompilations": 0 if first is None else graphs_compiled() - first,
        "world_size": context.world.size,
        "seed": context.config.train.seed,
        "weights_sha256": weights_sha256(context.engine.model_tensors(module)),
    }


def _final_metrics(trainer: Trainer) -> dict[str, Any]:
    """On the test set; the last evaluation's if it was just that."""
    split = "test" if trainer.context.splits.test is not None else "validation"
    last = trainer.progress.last
    if last.get("split") == split and last["step"] == trainer.progress.step:
        return last
    return trainer.evaluate(split)
