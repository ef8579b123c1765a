"""One run in its folder, from settings to summary."""

from __future__ import annotations

import gc
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from hpc_oialr.distributed import World, open_channel
from hpc_oialr.distributed.health import check_health
from hpc_oialr.errors import CheckpointError, DataError, FolderLostError, OIALRError
from hpc_oialr.record import RunFolder, environment_report
from hpc_oialr.record.owner import Claim, Ownership
from hpc_oialr.redaction import mask_tree
from hpc_oialr.system_errors import read_json
from hpc_oialr.train.checkpoint_store import CheckpointStore
from hpc_oialr.train.cuda_graph import refusal
from hpc_oialr.train.load_config import LoadedConfig, load_config
from hpc_oialr.train.process_settings import log_into, process_settings
from hpc_oialr.train.recorder import Recorder
from hpc_oialr.train.run_context import make_run_context
from hpc_oialr.train.same_run import (
    RESUMABLE,
    fixed_settings,
    may_change,
    require_same_run,
    require_settings,
    stored,
)
from hpc_oialr.train.timing import StopRequest
from hpc_oialr.train.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a run ended with."""

    folder: Path
    summary: dict[str, Any] | None  # content of summary.json; None if the run was stopped on request


def train(
    loaded: LoadedConfig,
    folder: Path,
    *,
    world: World | None = None,
    stop: StopRequest | None = None,
    claim: Claim | None = None,
) -> Result:
    """Train from the start in a new run folder; a collective call.

    ``world`` is by default made from the launcher's variables; ``stop`` may end the run early; ``claim`` says who
    works in the folder. FolderInUseError if another process does; another OIALRError if the folder holds a run, or
    if settings, data and world do not fit each other.
    """
    with joined(world, loaded) as world:
        # A default name contains the time, which ranks may have read in different seconds.
        run_folder = RunFolder(world.broadcast_object(folder))
        if world.broadcast_object(run_folder.holds_run):
            raise OIALRError(
                f"{folder} already holds a run. Go on with it: {run_folder.resume_command}, or --continue; or take "
                "another --out."
            )
        return _run(loaded, run_folder, world, stop, claim)


def train_or_resume(
    loaded: LoadedConfig,
    folder: Path,
    *,
    world: World | None = None,
    stop: StopRequest | None = None,
    claim: Claim | None = None,
) -> Result:
    """Start a run, resume it if ``folder`` holds it, or return at once if it is finished; a collective call.

    For the first job of a run and all later ones. OIALRError if the folder holds a run whose settings differ in more
    than ``RESUMABLE``; the rest as for :func:`train`.
    """
    run_folder = RunFolder(folder)
    if run_folder.holds_run:
        require_same_run(load_config(run_folder.config), loaded, folder)
    if run_folder.finished:
        return Result(folder, run_folder.read_summary())
    with joined(world, loaded) as world:
        return _run(loaded, run_folder, world, stop, claim)


def resume(
    folder: Path,
    *,
    settings: Sequence[str] = (),
    world: World | None = None,
    stop: StopRequest | None = None,
    claim: Claim | None = None,
) -> Result:
    """Resume a run from its last intact checkpoint, or from its start if it has none; a collective call.

    Checkpoints do not depend on the engine and the number of ranks that wrote them. ``settings`` are as on the
    command line, e.g. ``["--engine", "FSDP"]``, those under ``RESUMABLE`` only. CheckpointError if the folder holds
    no run, or all its checkpoints are damaged or of another model; the rest as for :func:`train`.
    """
    loaded, run_folder = load_run(folder, settings), RunFolder(folder)
    if run_folder.finished:
        return Result(folder, run_folder.read_summary())
    with joined(world, loaded) as world:
        return _run(loaded, run_folder, world, stop, claim)


def load_run(folder: Path, settings: Sequence[str] = ()) -> LoadedConfig:
    """The settings of the run in a folder, with others on top; errors as for :func:`resume`."""
    config = RunFolder(folder).config
    if not config.exists():
        raise CheckpointError(f"{folder} holds no run: there is no {config}.")
    for setting in (word for word in settings if word.startswith("--")):
        name = setting[2:].partition("=")[0]
        if not may_change(name):
            rule = f"cannot change when a run is resumed; those that can: {', '.join(RESUMABLE)}"
            raise OIALRError(f"{name} {rule}. Start another run with oialr train.")
    return load_config(config, settings)


@contextmanager
def joined(world: World | None, loaded: LoadedConfig) -> Iterator[World]:
    """The given world, or the launcher's on the settings' device, which is closed at the end.

    Not after an error: a teardown that waits for other ranks can hang.
    """
    if world is not None:
        yield world
        return
    train = loaded.config.train
    world = World.from_environment(device=train.device, timeout_s=train.timeout_s)
    yield world
    # A wrapper that dies after the group can deadlock gloo's thread.
    gc.collect()
    world.close()


def on_main(world: World, check: Callable[[], object]) -> None:
    """Call ``check`` on rank 0; an :class:`OIALRError` is raised on all ranks."""
    failure: OIALRError | None = None
    if world.is_main:
        try:
            check()
        except OIALRError as error:
            failure = error
    failure = world.broadcast_object(failure)
    if failure is not None:
        raise failure


@contextmanager
def owned(folder: RunFolder, world: World, claim: Claim) -> Iterator[Ownership | None]:
    """Claim the folder, on rank 0 for all ranks."""
    taken: list[Ownership] = []
    on_main(world, lambda: taken.append(claim.take(folder)))
    with closing(taken[0]) if taken else nullcontext() as held:
        yield held


def _run(
    loaded: LoadedConfig, folder: RunFolder, world: World, stop: StopRequest | None, claim: Claim | None
) -> Result:
    config, claim, stop = loaded.config, claim or Claim(), stop or StopRequest()
    on_main(world, folder.require_new)
    # Checked before data are loaded; taken once all that can fail early has passed.
    on_main(world, partial(claim.check, folder))
    if config.train.health_check:
        check_health(world, hashlib.sha256(loaded.text.encode()).hexdigest()[:12])
    with (
        process_settings(world, tf32=config.train.tf32, compiled=config.compile != "off"),
        world.reported("the run's communication", only_communication=True),
    ):
        channel = open_channel(world)
        # Before the folder is made: most errors are raised here.
        context = make_run_context(config, world)
        refusal(context)
        with owned(folder, world, claim) as held, log_into(folder.logs / f"process_{world.rank}.log"):
            if world.is_main:
                _begin_folder(folder, loaded)
            world.barrier()
            log.info("metrics go over %s", channel.name)
            lost = partial(_lost, folder, held)
            store = CheckpointStore(folder.checkpoints, world, keep=config.checkpoint.keep, lost=lost)
            recorder = Recorder(folder, context, channel, _attributes(loaded, world), deadline=stop.deadline)
            request = replace(stop, asked=lambda: stop.asked() or (held.lost if held else ""))
            settings = fixed_settings(loaded.tree)
            trainer = Trainer(context, store, recorder, settings=settings, stop=request)
            try:
                trainer.resume()
                if not trainer.progress.step:
                    on_main(world, partial(_require_begun_settings, folder, settings))
                summary = trainer.summary() if trainer.fit() else None
                if summary is not None:
                    recorder.finish()
            finally:
                trainer.close()
                recorder.close()
            if summary is not None:
                on_main(world, partial(_write_summary, folder, summary, lost))
            world.barrier()
            context.engine.end()
    channel.close()
    return Result(folder.path, summary)


def _lost(folder: RunFolder, held: Ownership | None) -> str:
    """Why nothing may be written into the run's folder any more; "" if it may."""
    if not folder.holds_run:
        return f"{folder.path} was removed while its run was going on"
    return held.look() if held is not None else ""


def _begin_folder(folder: RunFolder, loaded: LoadedConfig) -> None:
    """Write what the run folder lacks; ``config.yaml`` last, since it marks the folder as that of a run."""
    folder.create()
    if not folder.environment.exists():
        folder.write_environment(environment_report())
    if not folder.holds_run:
        folder.write_settings(stored(fixed_settings(loaded.tree)))
        folder.write_config(loaded.text)


def _require_begun_settings(folder: RunFolder, settings: Mapping[str, Any]) -> None:
    """Compare with ``checkpoints/settings.json``, for a run without a checkpoint."""
    if not folder.settings.exists():
        return
    try:
        require_settings({"settings": read_json(folder.settings)}, settings, str(folder.settings))
    except (DataError, LookupError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s): config.yaml counts.", folder.settings, error)


def _write_summary(folder: RunFolder, summary: dict[str, Any], lost: Callable[[], str]) -> None:
    if reason := lost():
        raise FolderLostError(f"{reason}; the run's result is lost.")
    try:
        folder.write_summary(summary)
    except OSError as error:
        raise CheckpointError(
            f"{folder.summary} cannot be written ({error}). Put that right, then: {folder.resume_command}"
        ) from error


def _attributes(loaded: LoadedConfig, world: World) -> dict[str, Any]:
    """Root attributes of ``spectra.h5``."""
    environment = environment_report() if world.is_main else {}
    return {
        "config": mask_tree(loaded.tree),
        "environment": environment,
        "git_commit": (environment.get("git") or {}).get("commit") or "",
        "seed": loaded.config.train.seed,
        "world_size": world.size,
        "world": {"size": world.size, "local_size": world.local_size, "launcher": world.launcher},
    }
