"""One run in its folder, from settings to summary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_oialr.errors import CheckpointError, OIALRError
from hpc_oialr.processes import World
from hpc_oialr.train.checkpoint_store import CheckpointStore
from hpc_oialr.train.load_config import LoadedConfig, load_config
from hpc_oialr.train.recorder import Recorder
from hpc_oialr.train.session import make_session
from hpc_oialr.train.summary import summarise
from hpc_oialr.train.trainer import Trainer

Stop = Callable[[], bool]


@dataclass(frozen=True)
class Result:
    """What a run ended with.

    Attributes
    ----------
    folder
        The run folder.
    summary
        Content of ``summary.json``; None if the run was stopped on request.
    """

    folder: Path
    summary: dict[str, Any] | None


def train(
    loaded: LoadedConfig, folder: Path, *, world: World | None = None, stop_requested: Stop | None = None
) -> Result:
    """Train from the start in a new run folder; a collective call.

    Parameters
    ----------
    loaded
        The run's settings.
    folder
        Run folder; must not hold a run.
    world
        The processes; default those of the launcher.
    stop_requested
        See :class:`Trainer`.

    Raises
    ------
    OIALRError
        If the folder holds a run, or settings, data and world do not fit each other.
    """
    with _joined(world, loaded) as joined:
        if joined.broadcast_object((folder / "config.yaml").exists()):
            raise OIALRError(f"{folder} already holds a run. Go on with it: oialr resume {folder}; or choose another --out.")
        return _run(loaded, folder, joined, stop_requested, resumed=False)


def resume(folder: Path, *, world: World | None = None, stop_requested: Stop | None = None) -> Result:
    """Go on with a run from its last whole checkpoint, or from its start if it has none; a collective call.

    Raises
    ------
    CheckpointError
        If the folder holds no run, or all its checkpoints are damaged or of another model.
    """
    path = folder / "config.yaml"
    if not path.exists():
        raise CheckpointError(f"{folder} holds no run: there is no {path}.")
    loaded = load_config(path)
    with _joined(world, loaded) as joined:
        return _run(loaded, folder, joined, stop_requested, resumed=True)
