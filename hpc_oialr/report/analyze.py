"""Spectra of checkpoints that another program wrote; layers are distributed over processes."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_oialr.distributed import World
from hpc_oialr.errors import ConfigError, DataError, OIALRError
from hpc_oialr.linalg.basis_change import BasisChange, basis_change
from hpc_oialr.linalg.svd import SVD, svd
from hpc_oialr.linalg.work_plan import longest_processing_time, svd_cost
from hpc_oialr.lowrank import Selection
from hpc_oialr.lowrank.attention import PROJECTIONS
from hpc_oialr.method.report import UpdateReport
from hpc_oialr.method.stability_tracker import measured
from hpc_oialr.outputs import claim
from hpc_oialr.record.environment_report import environment_report
from hpc_oialr.report.checkpoint import FILES, INDICES, Checkpoint, open_checkpoint
from hpc_oialr.spectra.files import write_record, written_by
from hpc_oialr.spectra.schema import LayerRows, rows_of_update, together


@dataclass(frozen=True)
class Matrix:
    """A layer's weight, m x n = (leading axis) x (all the rest), and its tensor's name in the checkpoint."""

    layer: str
    tensor: str
    m: int
    n: int


@dataclass(kw_only=True)
class MatrixSelection(Selection):
    """As :class:`hpc_oialr.lowrank.Selection` for a model, by what a checkpoint tells of it.

    ``kinds`` do not count, embeddings are left out by their names (by shape they may look like a layer), and the
    last layer is measured too. Grouped convolutions and ties are not recognised.
    """

    exclude: tuple[str, ...] = ("*embed*", "*wte*", "*wpe*")
    keep_last: bool = False

    def matrices(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Matrix]:
        """Selected matrices, with the numbers in their names in order."""
        found: dict[str, Matrix] = {}
        for name, shape in shapes.items():
            layer = layer_name(name)
            if layer is None or len(shape) < 2 or 0 in shape or not self.admits(layer):
                continue
            m, n = shape[0], math.prod(shape[1:])
            if min(m, n) < self.min_dim or max(m, n) > self.max_aspect * min(m, n):
                continue
            if layer in found:
                raise DataError(
                    f"{found[layer].tensor!r} and {name!r} are both the weight of layer {layer!r}. Leave one out of "
                    "the file."
                )
            found[layer] = Matrix(layer, name, m, n)

        def natural(matrix: Matrix) -> list[tuple[int, str]]:
            parts = re.split(r"(\d+)", matrix.layer)
            return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]

        kept = sorted(found.values(), key=natural)
        return kept[self.keep_first : len(kept) - self.keep_last]


def layer_name(tensor: str) -> str | None:
    """The layer that a tensor is the weight of, without what wrappers put before it; None for a bias and the like.

    Examples
    --------
    >>> layer_name("module.encoder.0.weight"), layer_name("attn.in_proj_weight"), layer_name("encoder.0.bias")
    ('encoder.0', 'attn.in_proj', None)
    """
    layer, _, parameter = tensor.removeprefix("module.").removeprefix("_orig_mod.").rpartition(".")
    if parameter in PROJECTIONS:
        return f"{layer}.{PROJECTIONS[parameter]}" if layer else PROJECTIONS[parameter]
    return layer if parameter == "weight" else None


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
    """Write the record that a run with ``record.spectra`` would have left, from its checkpoints; a collective call.

    Layers are distributed over processes, longest SVD first; each reads only its own, and holds two SVDs at a time.
    What is written does not depend on the number of processes.

    Parameters
    ----------
    paths, steps
        Dense checkpoints of one model, see :func:`~hpc_oialr.report.checkpoint.open_checkpoint`, and their steps;
        default the numbers in their names.
    out, force
        File to write, see :mod:`hpc_oialr.spectra.schema`; ``force`` replaces one that no analysis wrote.
    selection, world
        Which layers, and which processes; default all matrices, and this process alone.
    progress
        Called after each of this process's layers with how many are done, of how many.

    Raises
    ------
    ConfigError, DataError, NonFiniteError
        Steps are missing or equal; checkpoints cannot be read or are not of one model; a weight holds NaN or Inf.
    OutputError, OSError
        ``out`` is one of the checkpoints, or another file than an earlier analysis; it cannot be written.
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
        named = {str(step): str(path) for step, path in numbered}
        attributes = {
            "written_by": "oialr analyze",
            "config": {"analyze": {"checkpoints": named, "selection": vars(selection)}},
            "environment": environment_report(),
            "world_size": world.size,
            "world": {"size": world.size, "local_size": world.local_size, "launcher": world.launcher},
        }
        write_record(target, attributes, rows)
    world.barrier()
    return out


def steps_of(paths: Sequence[Path], given: Sequence[int] | None = None) -> list[int]:
    """One step a checkpoint: those ``given``, or the last number in the name of its file or folder.

    A file that is always called the same takes the number of its folder. Raises :class:`ConfigError` unless there is
    one different step for each.

    Examples
    --------
    >>> steps_of([Path("checkpoint-500"), Path("run2/step_00001000.pt"), Path("step-1500/model.safetensors")])
    [500, 1000, 1500]
    """
    if given is not None and len(given) != len(paths):
        raise ConfigError("--steps", list(given), f"must be one for each of the {len(paths)} checkpoints")
    steps = list(given or ())
    for path in paths if given is None else ():
        name = path.resolve().parent.name if path.name in FILES + INDICES else path.stem
        numbers = re.findall(r"\d+", name)
        if not numbers:
            rule = f"must be given: the name of {path} holds no number"
            raise ConfigError("--steps", None, rule, fix="E.g. --steps 100 200.")
        steps.append(int(numbers[-1]))
    for step in steps:
        if steps.count(step) > 1:
            same = ", ".join(str(path) for path, each in zip(paths, steps, strict=True) if each == step)
            rule = f"belongs to several checkpoints, {same}"
            raise ConfigError("--steps", step, rule, fix="Give each its own.")
    return steps


def _layers(checkpoints: Sequence[Checkpoint], selection: MatrixSelection) -> list[list[Matrix]]:
    """For each checkpoint its matrices: the same layers of the same shapes in the same order."""
    found = [selection.matrices(checkpoint.shapes) for checkpoint in checkpoints]
    sizes = [{each.layer: f"{each.m} x {each.n}" for each in matrices} for matrices in found]
    for checkpoint, size in zip(checkpoints, sizes, strict=True):
        for layer in sizes[0] | size:
            if sizes[0].get(layer) != size.get(layer):
                both = (checkpoints[0], sizes[0]), (checkpoint, size)
                held = ", ".join(f"{each.path} holds {of.get(layer, 'none')}" for each, of in both)
                raise DataError(
                    f"layer {layer}: {held}; all checkpoints must be of one model. "
                    "Leave it out by --exclude, or analyze them apart."
                )
    if not found or not found[0]:
        raise DataError(
            f"{checkpoints[0].path if checkpoints else 'the list of checkpoints'} holds no matrix of a layer "
            "that the selection admits; widen --include, --exclude or --max-aspect."
        )
    return found


def _gathered(
    layers: Sequence[Sequence[Matrix]],
    checkpoints: Sequence[tuple[int, Checkpoint]],
    world: World,
    progress: Callable[[int, int], None],
) -> tuple[LayerRows, ...]:
    """All layers' rows, on every process; if one process fails all raise, so that none waits for ever."""
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
