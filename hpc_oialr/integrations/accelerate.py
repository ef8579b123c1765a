"""OIALR in a loop of Hugging Face Accelerate."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from hpc_oialr import OIALR, OIALRConfig
from hpc_oialr.errors import MissingExtraError, ModelError
from hpc_oialr.integrations.launch import require_all_processes
from hpc_oialr.integrations.state_files import load_state, save_state
from hpc_oialr.method.report import UpdateReport

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError:
    raise MissingExtraError("accelerate", "accelerate", purpose="hpc_oialr.integrations.accelerate") from None

_ORDER = (
    "the order of the samples is not in Accelerate's checkpoints, so that a resumed run repeats the first epoch's. Use "
    "Accelerator(dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True)) and loader.set_epoch(epoch)."
)


class AcceleratedOIALR(OIALR):
    """The controller of a loop that uses an ``Accelerator``.

    ``step()`` is called in every pass through the loop and does nothing while gradients are accumulated.
    ``accelerator.save_state`` and :meth:`load_state` include the controller: nothing needs to be registered.

    Parameters
    ----------
    accelerator
        With one process, DDP or FSDP2 (``FullyShardedDataParallelPlugin(fsdp_version=2)``).
    model, optimizer
        What ``accelerator.prepare`` returned; on one process also what will be given to it.
    config, averages
        As for :class:`~hpc_oialr.OIALR`.

    Raises
    ------
    ModelError
        If the accelerator shards or replaces parameters in a way that OIALR cannot follow, uses fewer processes than
        were started, or the model was not prepared; and as :class:`~hpc_oialr.OIALR`.

    Warns
    -----
    UserWarning
        At ``save_state``, if samples are shuffled by a generator that Accelerate does not save.

    Notes
    -----
    ``accelerator.load_state(folder)`` does as well, except under FSDP2, where torch says "Missing key in checkpoint
    state_dict"; there a state is loaded into a model that is still dense, or has the stored r.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: Optimizer,
        config: OIALRConfig | None = None,
        *,
        averages: Sequence[nn.Module] = (),
    ) -> None:
        fix = "Without a GPU, Accelerator(cpu=True) uses them all"
        require_all_processes(accelerator.num_processes, "Accelerate", fix)
        require_supported(accelerator)
        if accelerator.num_processes > 1 and not isinstance(
            getattr(model, "_orig_mod", model), DistributedDataParallel | FSDPModule
        ):
            raise ModelError(
                f"the model was not prepared, and {accelerator.num_processes} processes share it: accelerate would wrap "
                "it later, around parameters that OIALR replaces. Call model, optimizer = accelerator.prepare(model, "
                "optimizer) first, and give both to AcceleratedOIALR."
            )
        super().__init__(model, optimizer, config, averages=averages)
        self.accelerator = accelerator
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    def step(self) -> UpdateReport | None:
        """:meth:`hpc_oialr.OIALR.step` if the optimizer has stepped; None while gradients are accumulated."""
        return super().step() if self.accelerator.sync_gradients else None

    def load_state(self, folder: str | Path, **options: Any) -> None:
        """Give the layers their stored r, then call ``accelerator.load_state(folder, **options)``.

        Raises :class:`CheckpointError` if the folder lacks the controller's state.
        """
        load_state(self, Path(folder))
        self.accelerator.load_state(str(folder), **options)

    def _save(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        if any(getattr(loader, "synchronized_generator", None) is not None for loader in self.accelerator._dataloaders):
            warnings.warn(_ORDER, stacklevel=3)
        save_state(self, Path(folder))

    def _load(self, models: list[nn.Module], folder: str) -> None:
        load_state(self, Path(folder))


def require_supported(accelerator: Accelerator) -> None:
    """Raise :class:`ModelError`, naming what to use, for engines in which parameters cannot be replaced."""
    kind, plugin = accelerator.distributed_type, getattr(accelerator.state, "fsdp_plugin", None)
    parallel = getattr(accelerator, "parallelism_config", None)
    axes = [axis for axis in ("tp", "cp", "sp") if getattr(parallel, f"{axis}_enabled", False)]
    if kind == DistributedType.FSDP and getattr(plugin, "fsdp_version", 1) == 1:
        name, fix = "FSDP of version 1", "set fsdp_version: 2"
    elif kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        name, fix = kind.value, "use DDP or FSDP (fsdp_version: 2); for DeepSpeed oialr train --engine DeepSpeed"
    elif axes:
        name, fix = f"parallelism_config with {axes[0]}", "use DDP or FSDP (fsdp_version: 2)"
    elif accelerator.mixed_precision == "fp8":
        name, fix = "mixed_precision fp8, which replaces layers,", "use bf16"
    else:
        return
    raise ModelError(f"Accelerate's {name} cannot be used with OIALR, which replaces parameters: {fix}.")
