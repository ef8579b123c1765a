"""OIALR in the loop of transformers' ``Trainer``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_oialr import OIALR, OIALRConfig, match_structure
from hpc_oialr.errors import CheckpointError, ConfigError, MissingExtraError, ModelError
from hpc_oialr.integrations.launch import require_all_processes
from hpc_oialr.integrations.state_files import load_state, read_state, save_state
from hpc_oialr.lowrank.kernel_modes import as_inner, factor_shapes
from hpc_oialr.lowrank.targets import every_weight

try:
    from hpc_oialr.integrations.accelerate import require_supported
except ImportError:
    raise MissingExtraError("accelerate", "accelerate", purpose="transformers' Trainer") from None
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint


class OIALRCallback(TrainerCallback):  # type: ignore[misc]
    """Trains a ``Trainer``'s model at low rank: converts it, cuts it, and keeps the controller in its checkpoints.

    Parameters
    ----------
    trainer
        The trainer, before ``train()``; the callback adds itself. One process, DDP or FSDP2.
    config
        The settings; times may be shares of the run.

    Attributes
    ----------
    oialr
        The controller, from the beginning of the training on.

    Raises
    ------
    ModelError, ConfigError
        If the trainer shards or replaces parameters in a way that OIALR cannot follow, before anything is done.

    Notes
    -----
    ``trainer.train(resume_from_checkpoint=...)`` loads weights before it calls any callback. So this object stands in
    for ``trainer.train``, and gives the layers their stored r first; under FSDP this works for checkpoints of the dense
    phase only, and others are refused. Checkpoints of the trials of a hyperparameter
    search have no state of the controller.
    """

    def __init__(self, trainer: Trainer, config: OIALRConfig | None = None) -> None:
        _require_supported(trainer)
        self.trainer, self.config = trainer, config or OIALRConfig()
        self.oialr: OIALR | None = None
        self._folder: Path | None = None
        self._train = trainer.train
        trainer.train = self._train_from
        trainer.add_callback(self)

    def _train_from(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **options: Any) -> Any:
        """``Trainer.train`` of a model whose layers have the r of the checkpoint."""
        _require_supported(self.trainer)
        folder = resume_from_checkpoint
        if folder is True:
            # None: Trainer says that there is none.
            folder = get_last_checkpoint(self.trainer.args.output_dir) or True
        self._folder = Path(folder) if isinstance(folder, str | Path) else None
        if self._folder is not None:
            self._restructure(self._folder)
        return self._train(folder, *args, **options)

    def _restructure(self, folder: Path) -> None:
        """Give the model, and an optimizer that the user has made, the layers of a checkpoint."""
        trainer, r = self.trainer, read_state(folder)["r"]
        if trainer.is_fsdp_enabled and r:
            raise ModelError(
                f"{folder} has {len(r)} low-rank layers, and Trainer loads them under FSDP before there is a controller, "
                "which cannot take them over then. Resume without FSDP, or from a checkpoint of the dense phase; "
                "AcceleratedOIALR in a loop of Accelerate resumes under FSDP."
            )
        if self.oialr is not None or trainer.optimizer is None:
            match_structure(trainer.model, _empty_state(trainer.model, folder))
            return
        if (processes := trainer.accelerator.num_processes) > 1:
            raise ModelError(
                f"the optimizer given to Trainer holds dense weights, and {processes} processes would resume with "
                "low-rank ones. Let Trainer make the optimizer: optim=..., or optimizer_cls_and_kwargs=(class, options)."
            )
        # Another length of the run changes nothing here.
        first = OIALR(trainer.model, trainer.optimizer, self.config.in_steps(1_000_000))
        load_state(first, folder)
        first.detach()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make the controller, or continue with that of an earlier call of ``train()``."""
        model, optimizer = self.trainer.model_wrapped, self.trainer.optimizer
        if self.oialr is None or self.oialr.model is not model or self.oialr.optimizer is not optimizer:
            if self.oialr is not None:
                self.oialr.detach()
            self.oialr = OIALR(model, optimizer, self.config.in_steps(state.max_steps))
        if self._folder is not None:
            load_state(self.oialr, self._folder)
            if self.oialr.t != state.global_step:
                raise CheckpointError(
                    f"{self._folder} is of step {state.global_step} and its OIALR state of step {self.oialr.t}: one of "
                    "them is of another checkpoint. Resume from an earlier one."
                )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A step of the method after the optimizer's."""
        assert self.oialr is not None
        self.oialr.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the controller's state into the checkpoint."""
        assert self.oialr is not None
        if not state.is_hyper_param_search:
            save_state(self.oialr, Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _empty_state(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The structure of a checkpoint's model as a state dict without values, for ``match_structure``."""
    r, empty = read_state(folder)["r"], dict[str, Tensor]()
    targets = {target.name: target for target in every_weight(model)}
    if unknown := r.keys() - targets.keys():
        raise ModelError(
            f"{folder} has a low-rank layer {min(unknown)!r} that this model does not have; it belongs to another model."
        )
    for name, target in targets.items():
        own, dtype = r.get(name), target.trained.dtype
        shapes: dict[str, Sequence[int]] = {"weight": target.shape}
        if own is not None:
            shapes = dict(zip(("U", "S", "Vh"), factor_shapes(target.dense_shape, as_inner(own)), strict=True))
        empty |= {f"{name}.{key}": torch.empty(shape, dtype=dtype, device="meta") for key, shape in shapes.items()}
    return empty


def _require_supported(trainer: Trainer) -> None:
    args = trainer.args
    fix = "Without a GPU, TrainingArguments(use_cpu=True) uses them all"
    require_all_processes(trainer.accelerator.num_processes, "Trainer", fix)
    require_supported(trainer.accelerator)
    if trainer.is_deepspeed_enabled:
        fix = "Leave it out; DDP and FSDP (version 2) work. For DeepSpeed itself: oialr train --engine DeepSpeed."
        raise ConfigError("deepspeed", args.deepspeed, "cannot be used with OIALR, which replaces parameters", fix=fix)
    if trainer.is_fsdp_enabled and args.load_best_model_at_end:
        rule = "loads another r into a model that FSDP has sharded, which OIALR cannot do"
        fix = "Set it to False, and load the best checkpoint into a new model afterwards."
        raise ConfigError("load_best_model_at_end", True, rule, fix=fix)
    if args.auto_find_batch_size:
        rule = "begins again in the middle of a run, with layers that may have changed"
        raise ConfigError("auto_find_batch_size", True, rule, fix="Set per_device_train_batch_size.")
    if args.n_gpu > 1:
        rule = f"means DataParallel on {args.n_gpu} GPUs, which copies the model in each step"
        raise ConfigError("n_gpu", args.n_gpu, rule, fix="Start one process per GPU: torchrun --nproc-per-node ...")
    if hasattr(trainer.model, "peft_config"):
        raise ModelError(
            "the model has PEFT adapters, which are low-rank already, and Trainer would save them only. Train the model "
            "itself with OIALR, or the adapters without."
        )
