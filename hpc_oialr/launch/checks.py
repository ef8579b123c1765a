"""What would end a job in its first minute, told before it is submitted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_oialr.errors import ConfigError, OIALRError
from hpc_oialr.launch.job_file import read_job
from hpc_oialr.launch.recipe_run import RecipeRun
from hpc_oialr.launch.slurm_state import Slurm
from hpc_oialr.launch.states import states_of
from hpc_oialr.record.run_folder import RunFolder

if TYPE_CHECKING:
    from hpc_oialr.train.config import TrainConfig


def check_settings(recipe: str | Path, settings: Sequence[str], processes: int) -> TrainConfig:
    """The settings of the loop, once the recipe's are valid and its batch can be dealt to the processes.

    Raises
    ------
    OIALRError
        If not.
    """
    from hpc_oialr.data.batches import check_shares
    from hpc_oialr.train.config_tree import in_section
    from hpc_oialr.train.load_config import load_config

    loaded = load_config(recipe, settings)
    section = "engine"
    try:
        shares = loaded.config.engine.shares(processes)
        section = "train"
        check_shares(loaded.config.train.global_batch, shares)
        loaded.config.train.check_accumulation(shares)
    except ConfigError as error:
        raise in_section(error, section, loaded.origins) from None
    return loaded.config.train


def check_free(run: RecipeRun) -> None:
    """See that a run's folder is new, or holds this very run, unfinished and without a job that works on it.

    Raises
    ------
    OIALRError
        If not.
    """
    folder = RunFolder(run.folder)
    folder.require_new()
    if folder.finished:
        raise OIALRError(f"{folder.path} holds a finished run. Take another folder, or remove it.")
    if folder.holds_run:
        _check_same(run, folder)
    if folder.job.exists():
        _check_idle(folder)


def _check_same(run: RecipeRun, folder: RunFolder) -> None:
    from hpc_oialr.train.load_config import load_config
    from hpc_oialr.train.run import require_same_run

    require_same_run(load_config(folder.config), load_config(run.recipe, run.settings), folder.path)


def _check_idle(folder: RunFolder) -> None:
    job = read_job(folder)
    (state,) = states_of([job], Slurm())
    if not state.over:
        raise OIALRError(
            f"job {job.job_id} ({state.state.lower()}) works in {folder.path}; one job a folder. "
            f"Wait for it, or end it: oialr cancel {shlex.quote(str(folder.path))}"
        )
