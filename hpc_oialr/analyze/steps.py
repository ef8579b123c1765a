"""The step at which a checkpoint was written, from its name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from hpc_oialr.analyze.checkpoint import FILES, INDICES
from hpc_oialr.errors import ConfigError


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
