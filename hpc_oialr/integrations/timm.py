"""OIALR in timm's training script, ``train.py``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hpc_oialr import OIALR, OIALRConfig
from hpc_oialr.errors import CheckpointError
from hpc_oialr.lowrank.targets import plain_name
from hpc_oialr.method.engine import SingleEngine
from hpc_oialr.method.report import UpdateReport
from hpc_oialr.torch_compat import allow_recompiles, is_wrapper

KEY = "oialr"  # in the optimizer's part of a checkpoint
log = logging.getLogger(__name__)


def match_checkpoint(model: nn.Module, optimizer: Optimizer, config: OIALRConfig, resume: str | Path) -> None:
    """Give a new model and its optimizer the layers of the checkpoint of ``--resume``; nothing for an empty string.

    For the script loads a checkpoint before it wraps the model, and only then there can be a controller. Every core takes
    its weight's place in the optimizer, so that the stored groups fit. Call it between making the optimizer and loading.
    Raises :class:`CheckpointError` if the checkpoint holds no state of a controller, and :class:`ModelError` as
    :class:`~hpc_oialr.OIALR`.
    """
    if resume:
        stored = _stored(Path(resume))
        # Another length of the run changes nothing here.
        first = OIALR(model, optimizer, config.in_steps(1_000_000), engine=SingleEngine())
        first.load_state_dict(stored["state"], stored["tensors"])
        first.detach()


class ScriptOIALR(OIALR):
    """The controller of timm's script, which keeps its state in the optimizer's part of the script's checkpoints.

    ``step()`` is called once per update, and logs on rank 0 what was done.

    Parameters
    ----------
    model
        What is trained, after the script has wrapped it.
    optimizer
        Made from it by the script.
    config
        The settings; times may be shares of the run.
    steps
        Updates of the whole run.
    averages
        The script's moving averages of the model, of which those that are None are left out.
    resume
        The script's ``--resume``; model and optimizer were given to :func:`match_checkpoint` before it was loaded.

    Raises
    ------
    CheckpointError
        If the checkpoint to resume holds no state of a controller.
    ModelError
        As :class:`~hpc_oialr.OIALR`.

    Notes
    -----
    The script saves on rank 0 alone, without a word to the others. So the bases that stability is measured by are
    gathered at every measurement, and with several ranks the sums of the last steps before a change (``importance``,
    ``grow``) are not stored: a run resumed in these steps goes on with a warning and other bits.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        config: OIALRConfig,
        *,
        steps: int,
        averages: Sequence[nn.Module | None] = (),
        resume: str | Path = "",
    ) -> None:
        stored = _stored(Path(resume)) if resume else None
        given = [average for average in averages if average is not None]
        super().__init__(model, optimizer, config.in_steps(steps), averages=given)
        if stored is not None:
            self.load_state_dict(stored["state"], stored["tensors"])
        self._bases: dict[str, Tensor] = stored["tensors"] if stored is not None else {}
        if any(map(is_wrapper, self.module.modules())):
            allow_recompiles(64)  # a graph for every r
        for leaf in self._optimizers.leaves:
            leaf.register_state_dict_post_hook(self._add_state)

    def step(self) -> UpdateReport | None:
        """:meth:`hpc_oialr.OIALR.step`, in the log as well."""
        report = super().step()
        if report is None:
            return None
        bases = self._tracker.bases(self._dense())
        self._bases = {plain_name(name): each for name, each in bases.items()}
        if self.engine.world.rank == 0:
            for part in report.all:
                r = [layer.r for layer in part.layers]
                log.info("step %d: %s of %d layers, r %d to %d", part.t, part.kind, len(r), min(r), max(r))
        return report

    def _add_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        sums = self.tensor_state() if self.engine.world.size == 1 else {}
        state[KEY] = {"state": self.state_dict(), "tensors": self._bases | sums}


def _stored(path: Path) -> dict[str, Any]:
    checkpoint = _read(path)
    stored = checkpoint.get("optimizer", {}).get(KEY)
    if stored is None:
        raise CheckpointError(
            f"{path} holds no state of OIALR beside its optimizer's: it was made by the script without OIALR. Start a "
            "new run from its weights, --initial-checkpoint in place of --resume."
        )
    return dict(stored)


def _read(path: Path) -> dict[str, Any]:
    """A checkpoint of the script, mapped into memory."""
    if not path.is_file():
        raise CheckpointError(f"--resume {path} is no file. Give the script's checkpoint, e.g. last.pth.tar.")
    # The script stores its arguments as they are.
    with torch.serialization.safe_globals([argparse.Namespace]):
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
