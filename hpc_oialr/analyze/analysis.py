"""Spectra of successive checkpoints, dealt over processes by layer."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hpc_oialr.analyze.checkpoint import FILES, INDICES, Checkpoint, open_checkpoint
from hpc_oialr.analyze.matrices import Matrix, MatrixSelection, same_matrices
from hpc_oialr.distributed import World
from hpc_oialr.errors import ConfigError, DataError, OIALRError
from hpc_oialr.linalg.basis_change import BasisChange, basis_change
from hpc_oialr.linalg.svd import SVD, svd
from hpc_oialr.linalg.work_plan import longest_processing_time, svd_cost
from hpc_oialr.method.report import UpdateReport
from hpc_oialr.method.stability_tracker import measured
from hpc_oialr.outputs import claim
from hpc_oialr.record.environment_report import environment_report
from hpc_oialr.spectra.files import write_record, written_by
from hpc_oialr.spectra.schema import LayerRows, rows_of_update, together


def analyze(
    paths: Sequence[Path | str],
    out: Path | str,
    *,
    steps: Sequence[int] | None = None,
    selection: MatrixSelection | None = None,
    world: World | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
    force: bool = False,
) -> Path:
    """Write the record that a run with ``record.spectra`` would have left, from checkpoints of it; a collective call.

    Layers are dealt over the processes, longest SVD first; each reads its own layers only, and holds two SVDs
    of one of them at a time. What is written does not depend on the number of processes.

    Parameters
    ----------
    paths
        Checkpoints of one model, dense; see :func:`~hpc_oialr.analyze.checkpoint.open_checkpoint`.
    out
        File to write, of the schema in :mod:`hpc_oialr.spectra.schema`.
    steps
        Of the checkpoints; default the numbers in their names.
    selection
        Which layers.
    world
        The processes; default this one alone.
    progress
        Told after each of this process's layers how many are done, of how many.
    force
        Replace a file that no analysis wrote; see :func:`hpc_oialr.outputs.claim`.

    Returns
    -------
    The path of the file.

    Raises
    ------
    ConfigError
        If steps are missing or equal.
    DataError
        If a checkpoint cannot be read, or they are not of one model.
    NonFiniteError
        If a weight holds NaN or Inf.
    OutputError
        If ``out`` is one of the checkpoints, or another file than an earlier analysis.
    OSError
        If the file cannot be written.
    """
    world, selection, out = world or World.single(), selection or MatrixSelection(), Path(out)
    given = [Path(path) for path in paths]
    # Now, not after hours of work.
    target = claim(out, written_by("oialr analyze"), inputs=given, force=force)
    numbered = sorted(zip(steps_of(given, steps), given, strict=True))
    checkpoints = [(step, open_checkpoint(path)) for step, path in numbered]
    layers = _layers([checkpoint for _, checkpoint in checkpoints], selection)
    # On every process, so that all end if it cannot be.
    target.parent.mkdir(parents=True, exist_ok=True)
    rows = _gathered(layers, checkpoints, world, progress)
    if world.is_main:
        write_record(target, _attributes(numbered, selection, world), rows)
    world.barrier()
    return out


def _layers(checkpoints: Sequence[Checkpoint], selection: MatrixSelection) -> list[list[Matrix]]:
    """For each checkpoint its matrices, the same layers in the same order."""
    found = [selection.matrices(checkpoint.shapes) for checkpoint in checkpoints]
    for checkpoint, matrices in zip(checkpoints, found, strict=True):
        same_matrices(found[0], matrices, (str(checkpoints[0].path), str(checkpoint.path)))
    if not found or not found[0]:
        raise DataError(
            f"{checkpoints[0].path if checkpoints else 'the list of checkpoints'} holds no matrix of a layer "
            "that the selection lets in; widen --include, --exclude or --max-aspect."
        )
    return found


def _gathered(
    layers: Sequence[Sequence[Matrix]],
    checkpoints: Sequence[tuple[int, Checkpoint]],
    world: World,
    progress: Callable[[int, int], None],
) -> tuple[LayerRows, ...]:
    """All layers' rows, on every process; one that fails makes all raise, so that none waits for ever."""
    owners = longest_processing_time([svd_cost(each.m, each.n) for each in layers[0]], world.size)
    mine: list[LayerRows] = []
    failure: OIALRError | None = None
    try:
        for index, owner in enumerate(owners):
            if owner == world.rank:
                mine.append(_measure([each[index] for each in layers], checkpoints, index, world))
                progress(len(mine), owners.count(world.rank))
    except OIALRError as error:
        failure = error
    parts = world.all_gather_object((mine, failure))
    for _, failed in parts:
        if failed is not None:
            raise failed
    return tuple(sorted((rows for part, _ in parts for rows in part), key=lambda rows: rows.index))


def _measure(
    matrices: Sequence[Matrix], checkpoints: Sequence[tuple[int, Checkpoint]], index: int, world: World
) -> LayerRows:
    """One layer through all checkpoints."""
    last: SVD | None = None
    events = []
    for matrix, (step, checkpoint) in zip(matrices, checkpoints, strict=True):
        start = time.perf_counter()
        weight = checkpoint.tensor(matrix.tensor).to(world.device).reshape(matrix.m, matrix.n)
        now = svd(weight, name=f"{matrix.layer} of {checkpoint.path}")
        change = basis_change(last, now) if last is not None else BasisChange()
        shape = (matrix.m, matrix.n)
        update = measured(matrix.layer, shape, now.s, change, time.perf_counter() - start)
        report = UpdateReport(
            t=step, kind="stability", layers=(update,), seconds=update.seconds, bytes_sent=0
        )
        events.append(rows_of_update(report, {update.name: index}))
        last = now
    return together(events).layers[0]


def _attributes(
    numbered: Sequence[tuple[int, Path]], selection: MatrixSelection, world: World
) -> dict[str, Any]:
    checkpoints = {str(step): str(path) for step, path in numbered}
    return {
        "written_by": "oialr analyze",
        "config": {"analyze": {"checkpoints": checkpoints, "selection": vars(selection)}},
        "environment": environment_report(),
        "world_size": world.size,
        "world": {"size": world.size, "local_size": world.local_size, "launcher": world.launcher},
    }


def steps_of(paths: Sequence[Path], given: Sequence[int] | None = None) -> list[int]:
    """One step a checkpoint.

    The last number in the file's or folder's name; of a file that is always called the same, in its folder's.

    Parameters
    ----------
    given
        The steps, instead.

    Raises
    ------
    ConfigError
        If a name has no number, or two have the same; or if ``given`` are not one different step each.

    Examples
    --------
    >>> steps_of([Path("checkpoint-500"), Path("run2/step_00001000.pt"), Path("step-1500/model.safetensors")])
    [500, 1000, 1500]
    """
    if given is not None and len(given) != len(paths):
        raise ConfigError("--steps", list(given), f"must be one for each of the {len(paths)} checkpoints")
    steps = [_step(path) for path in paths] if given is None else list(given)
    for step in steps:
        if steps.count(step) > 1:
            same = ", ".join(str(path) for path, each in zip(paths, steps, strict=True) if each == step)
            raise ConfigError(
                "--steps", step, f"belongs to several checkpoints, {same}", fix="Give each its own."
            )
    return steps


def _step(path: Path) -> int:
    name = path.resolve().parent.name if path.name in (*FILES, *INDICES) else path.stem
    numbers = re.findall(r"\d+", name)
    if not numbers:
        raise ConfigError(
            "--steps", None, f"must be given: the name of {path} holds no number", fix="E.g. --steps 100 200."
        )
    return int(numbers[-1])
