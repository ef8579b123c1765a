"""Spectra of checkpoints that another program wrote; layers are distributed over ranks."""

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
    """:class:`hpc_oialr.lowrank.Selection` by names and shapes alone; includes the last layer.

    ``kinds`` are ignored, and embeddings excluded by name. Grouped convolutions and ties are not recognised.
    """

    exclude: tuple[str, ...] = ("*embed*", "*wte*", "*wpe*")
    keep_last: bool = False

    def matrices(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Matrix]:
        """Selected matrices, sorted by name, numbers in names by value."""
        found: dict[str, Matrix] = {}
        for name, shape in shapes.items():
            layer = layer_name(name)
            if layer is None or len(shape) < 2 or 0 in shape or not self.admits(layer):
                continue
            m, n = shape[0], math.prod(shape[1:])
            if min(m, n) < self.min_dim or max(m, n) > self.max_aspect * min(m, n):
                continue
            if layer in found:
                both = f"{found[layer].tensor!r} and {name!r} are both the weight of layer {layer!r}"
                raise DataError(f"{both}. Leave one out of the file.")
            found[layer] = Matrix(layer, name, m, n)

        def natural(layer: str) -> list[tuple[int, str]]:
            return [(int(p), "") if p.isdigit() else (-1, p) for p in re.split(r"(\d+)", layer)]

        kept = [found[layer] for layer in sorted(found, key=natural)]
        return kept[self.keep_first : len(kept) - self.keep_last]


def layer_name(tensor: str) -> str | None:
    """The layer whose weight a tensor is, without the prefixes of wrappers; None for a bias and the like."""
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

    Layers are distributed over ranks, longest SVD first; each reads only its own, and keeps two SVDs at a time.
    The file does not depend on the number of ranks.

    ``paths`` are dense checkpoints of one model, see :func:`~hpc_oialr.report.checkpoint.open_checkpoint`, and ``steps``
    theirs, by default the last numbers in their names. ``out`` has the schema of :mod:`hpc_oialr.spectra.schema`;
    ``force`` replaces one that no analysis wrote. ``progress`` is called after each layer of this rank with the layers
    done and their total. By default all matrices are measured, on one rank.

    Raises ConfigError, DataError or NonFiniteError if steps are missing or equal, checkpoints cannot be read or are not
    of one model, or a weight holds NaN or Inf; OutputError or OSError if ``out`` is a checkpoint, is not from an earlier
    analysis or cannot be written.
    """
    world, selection, out = world or World.single(), selection or MatrixSelection(), Path(out)
    given = [Path(path) for path in paths]
    # Before hours of work.
    target = claim(out, written_by("oialr analyze"), inputs=given, force=force)
    numbered = sorted(zip(steps_of(given, steps), given, strict=True))
    checkpoints = [(step, open_checkpoint(path)) for step, path in numbered]
    layers = _layers([checkpoint for _, checkpoint in checkpoints], selection)
    # On every rank, so that all raise if it fails.
    target.parent.mkdir(parents=True, exist_ok=True)
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
    # If one rank fails all raise, so that none waits for it.
    parts = world.all_gather_object((mine, failure))
    for _, failed in parts:
        if failed is not None:
            raise failed
    if world.is_main:
        rows = sorted((each for part, _ in parts for each in part), key=lambda each: each.index)
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
    """The steps ``given``, or the last number in the name of each file (of its folder for ``model.safetensors`` etc.).

    Raises :class:`ConfigError` unless each checkpoint has its own step.
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
    """The matrices of each checkpoint; raises DataError unless layers and shapes are the same in all."""
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


def _measure(
    matrices: Sequence[Matrix], checkpoints: Sequence[tuple[int, Checkpoint]], index: int, world: World
) -> LayerRows:
    """One layer through all checkpoints."""
    last: SVD | None = None
    events = []
    for matrix, (step, checkpoint) in zip(matrices, checkpoints, strict=True):
        start, shape = time.perf_counter(), (matrix.m, matrix.n)
        now = svd(
            checkpoint.tensor(matrix.tensor).to(world.device).reshape(shape),
            name=f"{matrix.layer} of {checkpoint.path}",
        )
        change = basis_change(last, now) if last is not None else BasisChange()
        update = measured(matrix.layer, shape, now.s, change, seconds := time.perf_counter() - start)
        report = UpdateReport(t=step, kind="stability", layers=(update,), seconds=seconds, bytes_sent=0)
        events.append(rows_of_update(report, {update.name: index}))
        last = now
    return together(events).layers[0]
