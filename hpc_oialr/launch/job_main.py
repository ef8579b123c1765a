"""One run inside one job: warned by signals, aware of the job's end, begun or gone on with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from hpc_oialr.distributed.environment import launch_info
from hpc_oialr.distributed.signals import NAMES, catch_signals
from hpc_oialr.distributed.slurm_job import max_requeues, slurm_job
from hpc_oialr.exit_codes import FINISHED, STOPPED
from hpc_oialr.launch.scontrol import end_of
from hpc_oialr.launch.states import job_over

if TYPE_CHECKING:
    from hpc_oialr.train.load_config import LoadedConfig
    from hpc_oialr.train.run import Result
    from hpc_oialr.train.stopping import StopRequest


def run_job(recipe: str | Path, folder: Path, settings: Sequence[str] = (), *, dense: bool = False) -> int:
    """Begin a run, or go on with the one in ``folder``, under the launcher's processes; its exit code.

    Parameters
    ----------
    recipe
        Name of a recipe, or a YAML file.
    folder
        Run folder.
    settings
        As on the command line.
    dense
        Train the recipe's dense twin.

    Raises
    ------
    OIALRError
        What the user can put right, and :class:`ProcessLostError`; ``exit_codes.of_error`` gives its code.
    """
    from hpc_oialr.record.owner import Claim
    from hpc_oialr.train.load_config import dense_twin, load_config
    from hpc_oialr.train.run import train_or_resume

    loaded = load_config(recipe, settings)
    loaded = dense_twin(loaded, own=True) if dense else loaded
    with stop_requests(loaded) as stop:
        return code_of(train_or_resume(loaded, folder, stop=stop, claim=Claim("a submitted job", job_over)))


@contextmanager
def stop_requests(loaded: LoadedConfig) -> Iterator[StopRequest]:
    """What may end a run early: any signal that asks for it, Ctrl-C, a closed terminal, the end of the job.

    Raises
    ------
    ConfigError
        If ``OIALR_MAX_REQUEUES``, which is read at the end, is no number.
    """
    from hpc_oialr.train.stopping import StopRequest

    max_requeues()
    with catch_signals((loaded.config.train.stop_signal, *NAMES, "INT"), interrupted) as flag:
        yield StopRequest(lambda: _reason(flag.name), job_end())


def _reason(name: str) -> str:
    return "Ctrl-C" if name == "INT" else name and f"signal {name}"


def interrupted() -> None:
    """Tell the one at the terminal; called by a signal's handler, so past Python's buffers."""
    if launch_info().rank == 0:
        with suppress(OSError):
            os.write(2, b"\noialr: a checkpoint is written after this step; Ctrl-C again: end at once\n")


def code_of(result: Result) -> int:
    """The exit code of a run that went well so far."""
    return STOPPED if result.summary is None else FINISHED


def job_end(
    environ: Mapping[str, str] | None = None,
    *,
    ask: Callable[[str], float | None] = end_of,
    clock: Callable[[], float] = time.time,
) -> float | None:
    """Unix time of the end of the job around this process (s), if there is one and it ends.

    From the job's variables, or, where these do not tell or lie in the past, because the limit was extended,
    asked of Slurm: by the main process alone, since a thousand of them at once would hurt Slurm.
    """
    job = slurm_job(environ)
    if job is None:
        return None
    if job.end is not None and job.end > clock():
        return job.end
    return ask(job.id) if launch_info(environ).rank == 0 else None
