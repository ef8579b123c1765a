"""OIALR in the loop of Lightning's ``Trainer``."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from hpc_oialr import OIALR, OIALRConfig, match_structure
from hpc_oialr.errors import CheckpointError, MissingExtraError, ModelError
from hpc_oialr.integrations.launch import require_all_processes
from hpc_oialr.integrations.state_files import own_tensors
from hpc_oialr.lowrank.attachment import controller_of

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    raise MissingExtraError("lightning", "lightning", purpose="hpc_oialr.integrations.lightning") from None

KEY = "oialr"  # in a checkpoint
_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
_AVERAGES = ("WeightAveraging", "StochasticWeightAveraging")


class OIALRCallback(Callback):  # type: ignore[misc]
    """Trains a ``LightningModule`` at low rank: converts it, cuts it, and keeps the controller in its checkpoints.

    Also give it to a trainer that only evaluates: it gives the module the r of a checkpoint.

    Parameters
    ----------
    config
        The settings; times may be shares of the run.

    Attributes
    ----------
    oialr
        The controller, from ``on_fit_start`` on.

    Raises
    ------
    ModelError
        At the start of ``fit``: for strategies other than one device and DDP, several optimizers or manual
        optimization, and callbacks that average weights.
    """

    def __init__(self, config: OIALRConfig | None = None) -> None:
        self.config = config or OIALRConfig()
        self.oialr: OIALR | None = None
        self._stored: dict[str, Any] | None = None
        self._handle: RemovableHandle | None = None
        self._steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the trainer, and let the module take the structure of what is loaded into it."""
        if stage == "fit":
            _require_supported(trainer, pl_module)
        if self._handle is None:
            self._handle = pl_module.register_load_state_dict_pre_hook(_match)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the controller's state until there is a controller."""
        self._stored = checkpoint.get(KEY)
        if self._stored is None and trainer.state.fn == "fit":
            raise CheckpointError(
                f"the checkpoint {trainer.ckpt_path} holds no {KEY!r}: it was made without OIALRCallback, or with "
                "weights_only. Load its weights into the module, and fit without ckpt_path."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the controller, around the wrapper that Lightning calls."""
        if len(trainer.optimizers) != 1:
            raise ModelError(
                f"configure_optimizers returns {len(trainer.optimizers)} optimizers; OIALRCallback takes one. Use "
                "OIALR in training_step with manual optimization, and several optimizers as a list."
            )
        total = trainer.estimated_stepping_batches
        config = self.config if math.isinf(total) else self.config.in_steps(int(total))
        self.oialr = OIALR(trainer.strategy.model, trainer.optimizers[0], config)
        if self._stored is not None:
            self.oialr.load_state_dict(self._stored["state"], self._stored["tensors"])
            self._stored = None
        self._steps = self.oialr.t

    def on_train_batch_start(self, *_: Any) -> None:
        """What a call of the module would do: Lightning calls its ``training_step`` instead."""
        assert self.oialr is not None
        self.oialr.before_forward()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """A step of the method after the optimizer's; none while gradients are accumulated."""
        assert self.oialr is not None
        if trainer.global_step != self._steps:
            self._steps = trainer.global_step
            self.oialr.step()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the controller's state, with the sums of every rank, into the checkpoint; a collective call."""
        checkpoint[KEY] = self._state()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module to evaluations, or to another call of ``fit``, which continues."""
        if self.oialr is not None and controller_of(self.oialr.module) is self.oialr:
            self._stored = self._state()
            self.oialr.detach()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _state(self) -> dict[str, Any] | None:
        if self.oialr is None or controller_of(self.oialr.module) is not self.oialr:
            return self._stored
        parts = self.oialr.engine.world.all_gather_object(own_tensors(self.oialr))
        return {"state": self.oialr.state_dict(), "tensors": {name: t for part in parts for name, t in part.items()}}


def _match(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Pre-hook of ``load_state_dict`` for a module without a controller, whose own hook does the same."""
    if controller_of(module) is None and not prefix:
        match_structure(module, state)


def _require_supported(trainer: Trainer, module: LightningModule) -> None:
    fix = "Give Trainer devices and num_nodes as they were started"
    require_all_processes(trainer.world_size, "Lightning", fix)
    strategy = type(trainer.strategy).__name__
    if strategy not in _STRATEGIES:
        raise ModelError(
            f"Lightning's {strategy} cannot be used with OIALR, which replaces parameters; supported are "
            f"{' and '.join(_STRATEGIES)}. Use strategy='ddp', or, for sharded models, oialr.integrations.accelerate."
        )
    if not module.automatic_optimization:
        raise ModelError(
            "the module optimizes manually, so that OIALRCallback cannot know when a step ends. Call OIALR(self, "
            "optimizer) in on_fit_start and its step() after optimizer.step()."
        )
    kinds = [kind.__name__ for callback in trainer.callbacks for kind in type(callback).__mro__]
    if found := next((kind for kind in kinds if kind in _AVERAGES), None):
        raise ModelError(
            f"the callback {found} keeps a copy of the weights, whose shapes would not follow. Leave it out; in your own "
            "loop OIALR(..., averages=[...]) transforms averages."
        )
