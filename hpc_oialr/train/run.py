"""One run in its folder, from settings to summary."""

from __future__ import annotations

import functools
import gc
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpc_oialr.distributed import MetricsChannel, World, open_channel
from hpc_oialr.distributed.health import check_health
from hpc_oialr.errors import CheckpointError, DataError, FolderLostError, OIALRError
from hpc_oialr.record import RunFolder, environment_report
from hpc_oialr.record.owner import Claim, Ownership
from hpc_oialr.redaction import MaskingFormatter, mask_tree
from hpc_oialr.system_errors import read_json
from hpc_oialr.train.checkpoint_store import CheckpointStore
from hpc_oialr.train.load_config import LoadedConfig, load_config
from hpc_oialr.train.process_settings import process_settings
from hpc_oialr.train.recorder import Recorder
from hpc_oialr.train.run_context import make_run_context
from hpc_oialr.train.same_run import (
    RESUMABLE,
    differing,
    fixed_settings,
    may_change,
    require_settings,
    stored,
)
from hpc_oialr.train.stopping import StopRequest
from hpc_oialr.train.summary import summarise
from hpc_oialr.train.trainer import Trainer

log = logging.getLogger(__name__)


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
    loaded: LoadedConfig,
    folder: Path,
    *,
    world: World | None = None,
    stop: StopRequest | None = None,
    claim: Claim | None = None,
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
    stop
        What may end the run early.
    claim
        How the folder is claimed.

    Raises
    ------
    FolderInUseError
        If another process works in the folder.
    OIALRError
        If the folder holds a run, or settings, data and world do not fit each other.
    """
    with _joined(world, loaded) as joined:
        # A default name holds the time, which the processes may have read in different seconds.
        run_folder = RunFolder(joined.broadcast_object(folder))
        if joined.broadcast_object(run_folder.holds_run):
            raise OIALRError(
                f"{folder} already holds a run. Go on with it: {run_folder.resume_command}, or --continue; or take "
                "another --out."
            )
        return _run(loaded, run_folder, joined, stop, claim)


def train_or_resume(
    loaded: LoadedConfig,
    folder: Path,
    *,
    world: World | None = None,
    stop: StopRequest | None = None,
    claim: Claim | None = None,
) -> Result:
    """Begin a run, or go on with it if ``folder`` holds it, or return at once if it is finished.

    The same call serves the first job of a run and every one after it; a collective call.

    Parameters
    ----------
    loaded, folder, world, stop, claim
        As for :func:`train`.

    Raises
    ------
    OIALRError
        If the folder holds a run with other settings, but for those under ``RESUMABLE``.
    """
    run_folder = RunFolder(folder)
    if run_folder.holds_run:
        require_same_run(load_config(run_folder.config), loaded, folder)
    if run_folder.finished:
        return Result(folder, run_folder.read_summary())
    with _joined(world, loaded) as joined:
        return _run(loaded, run_folder, joined, stop, claim)


def resume(
    folder: Path,
    *,
    settings: Sequence[str] = (),
    world: World | None = None,
    stop: StopRequest | None = None,
    claim: Claim | None = None,
) -> Result:
    """Go on with a run from its last whole checkpoint, or from its start if it has none; a collective call.

    Checkpoints do not depend on the engine and the number of processes that wrote them.

    Parameters
    ----------
    settings
        As on the command line, e.g. ``["--engine", "FSDP"]``; those under ``RESUMABLE`` only.

    Raises
    ------
    CheckpointError
        If the folder holds no run, or all its checkpoints are damaged or of another model.
    OIALRError
        For a setting that would make it another run.
    """
    run_folder = RunFolder(folder)
    loaded = load_run(folder, settings)
    if run_folder.finished:
        return Result(folder, run_folder.read_summary())
    with _joined(world, loaded) as joined:
        return _run(loaded, run_folder, joined, stop, claim)


def load_run(folder: Path, settings: Sequence[str] = ()) -> LoadedConfig:
    """The settings of the run in a folder, with others on top that may change when it is resumed.

    Raises
    ------
    CheckpointError
        If the folder holds no run.
    OIALRError
        For a setting that would make it another run.
    """
    run_folder = RunFolder(folder)
    if not run_folder.holds_run:
        raise CheckpointError(f"{folder} holds no run: there is no {run_folder.config}.")
    for setting in (word for word in settings if word.startswith("--")):
        name = setting[2:].partition("=")[0]
        if not may_change(name):
            rule = f"cannot change when a run is resumed; those that can: {', '.join(RESUMABLE)}"
            raise OIALRError(f"{name} {rule}. Start another run with oialr train.")
    return load_config(run_folder.config, settings)


def require_same_run(there: LoadedConfig, here: LoadedConfig, folder: Path) -> None:
    """Raise :class:`OIALRError` that names the first setting that must not differ but does."""
    theirs, ours = fixed_settings(there.tree), fixed_settings(here.tree)
    names = differing(theirs, ours)
    if names:
        name, more = names[0], f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise OIALRError(
            f"{folder} holds a run with other settings: {name} is {theirs.get(name)!r} there, {ours.get(name)!r} "
            f"here{more}; only these may differ: {', '.join(RESUMABLE)}. Take another --out, or go on with the "
            f"run as it is: {RunFolder(folder).resume_command}"
        )


@contextmanager
def _joined(world: World | None, loaded: LoadedConfig) -> Iterator[World]:
    """The given processes, or those of the launcher, which are left again at the end."""
    if world is not None:
        yield world
        return
    joined = join(loaded)
    yield joined
    leave(joined)


def join(loaded: LoadedConfig) -> World:
    """The processes that the launcher started, on the device and with the timeout of the settings."""
    train = loaded.config.train
    return World.from_environment(device=train.device, timeout_s=train.timeout_s)


def leave(world: World) -> None:
    """End the process group after a run that went well.

    Not after an error: the others may be anywhere, and a teardown that waits for them can hang. A
    wrapper that dies after the group can deadlock gloo's thread, so wrappers go first.
    """
    gc.collect()
    world.close()


def on_main(world: World, check: Callable[[], object]) -> None:
    """What fails on the main process fails on all."""
    failure: OIALRError | None = None
    if world.is_main:
        try:
            check()
        except OIALRError as error:
            failure = error
    failure = world.broadcast_object(failure)
    if failure is not None:
        raise failure


def _begin(folder: RunFolder, loaded: LoadedConfig, world: World) -> None:
    """A new run folder, or what is missing in one; the settings come last, they make it one."""
    if world.is_main:
        folder.create()
        if not folder.environment.exists():
            folder.write_environment(environment_report())
        if not folder.holds_run:
            folder.write_settings(stored(fixed_settings(loaded.tree)))
            folder.write_config(loaded.text)
    world.barrier()


def _require_begun_settings(folder: RunFolder, settings: Mapping[str, Any]) -> None:
    """What a checkpoint says of the settings says the folder until there is one."""
    if not folder.settings.exists():
        return
    try:
        require_settings({"settings": read_json(folder.settings)}, settings, str(folder.settings))
    except (DataError, LookupError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s): config.yaml counts.", folder.settings, error)


def _run(
    loaded: LoadedConfig, folder: RunFolder, world: World, stop: StopRequest | None, claim: Claim | None
) -> Result:
    claim = claim or Claim()
    on_main(world, folder.require_new)
    # Now, before data are loaded; taken it is when all that can fail at once has not.
    on_main(world, functools.partial(claim.check, folder))
    if loaded.config.train.health_check:
        check_health(world, hashlib.sha256(loaded.text.encode()).hexdigest()[:12])
    config = loaded.config
    settings = process_settings(world, tf32=config.train.tf32, compiled=config.compile)
    with settings, world.reported("the run's communication", only_communication=True):
        channel = open_channel(world)
        result = _train(loaded, folder, channel, world, stop or StopRequest(), claim)
    channel.close()
    return result


def _train(
    loaded: LoadedConfig,
    folder: RunFolder,
    channel: MetricsChannel,
    world: World,
    stop: StopRequest,
    claim: Claim,
) -> Result:
    # What cannot run at all fails here, before there is a folder.
    context = make_run_context(loaded.config, world)
    with owned(folder, world, claim) as held, _logged(folder, world):
        _begin(folder, loaded, world)
        asked = stop.asked
        stop = replace(stop, asked=lambda: asked() or (held.lost if held else ""))
        store = CheckpointStore(
            folder.checkpoints,
            world,
            keep=loaded.config.checkpoint.keep,
            lost=lambda: _lost(folder, held),
        )
        log.info("metrics go over %s", channel.name)
        recorder = Recorder(folder, context, channel, _attributes(loaded, world), deadline=stop.deadline)
        trainer = Trainer(context, store, recorder, settings=fixed_settings(loaded.tree), stop=stop)
        try:
            trainer.resume()
            if not trainer.progress.step:
                on_main(world, lambda: _require_begun_settings(folder, trainer.settings))
            summary = summarise(trainer) if trainer.fit() else None
            if summary is not None:
                recorder.finish()
        finally:
            recorder.close()
        if summary is not None:
            on_main(world, functools.partial(_write_summary, folder, summary, held))
        world.barrier()
        context.engine.end()
    return Result(folder.path, summary)


@contextmanager
def owned(folder: RunFolder, world: World, claim: Claim) -> Iterator[Ownership | None]:
    """The folder is this run's meanwhile; the main process holds it for all."""
    taken: list[Ownership] = []
    on_main(world, lambda: taken.append(claim.take(folder)))
    with closing(taken[0]) if taken else nullcontext() as held:
        yield held


def _lost(folder: RunFolder, held: Ownership | None) -> str:
    """Why nothing may be written into the run's folder any more."""
    if not folder.holds_run:
        return f"{folder.path} was removed while its run was going on"
    return held.look() if held is not None else ""


def _write_summary(folder: RunFolder, summary: dict[str, Any], held: Ownership | None) -> None:
    if reason := _lost(folder, held):
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


@contextmanager
def _logged(folder: RunFolder, world: World) -> Iterator[None]:
    """This process's log in the folder, meanwhile."""
    logger = logging.getLogger("hpc_oialr")
    handler = _log_file(folder.logs / f"process_{world.rank}.log")
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()


class _LogFile(logging.FileHandler):
    """Lines that a full disk has no room for are dropped; logging would print a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say nothing: metrics and checkpoints say that the disk is full."""

    def close(self) -> None:
        """Close; what the last flush has no room for hides no other error."""
        with suppress(OSError):
            super().close()


def _log_file(path: Path) -> logging.Handler:
    """The log is worth a warning, not a run."""
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        return _LogFile(path)
    except OSError as error:
        log.warning("%s cannot be written (%s): this process keeps no log.", path, error)
        return logging.NullHandler()
