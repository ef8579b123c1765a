"""Whether a checkpoint or folder belongs to this run: settings, data and model; which settings may change."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_oialr.errors import CheckpointError, OIALRError
from hpc_oialr.record import RunFolder
from hpc_oialr.redaction import mask_tree
from hpc_oialr.train.load_config import RETIRED, LoadedConfig, flat

log = logging.getLogger(__name__)

# What does not change the result: where it is computed, from which disk, how often it is saved. ``dense`` and ``paper``
# contain the settings of other runs.
RESUMABLE = (
    "engine",
    "train.device",
    "train.timeout_s",
    "train.stop_signal",
    "train.health_check",
    "train.workers",
    "train.cuda_graph",
    "train.channels_last",
    "compile",
    "train.profile",
    "train.profile_ranks",
    "train.peak_tflops",
    "checkpoint",
    "record.tracker",
    "record.project",
    "data.path",
    "data.data_dir",
    "data.on_device",
    "data.tokenizer",
    "model.path",
    "dense",
    "paper",
)


def may_change(name: str) -> bool:
    """Whether a setting may change when a run is resumed."""
    return name in RETIRED or any(name == allowed or name.startswith(f"{allowed}.") for allowed in RESUMABLE)


def fixed_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that may not change, by dotted name, with values as read back from JSON."""
    fixed = {name: value for name, value in flat(tree).items() if not may_change(name)}
    as_json: dict[str, Any] = json.loads(json.dumps(fixed, default=str))
    return as_json


def stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a checkpoint stores them; secrets are masked, since it may be shared."""
    return {"sha256": _sha256(settings), "values": _shareable(settings)}


def _shareable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Secrets masked; other secrets still give other values."""
    masked = {name: mask_tree(value, name) for name, value in settings.items()}
    return {
        name: value if value == settings[name] else f"{value} #{_sha256({name: settings[name]})[:8]}"
        for name, value in masked.items()
    }


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Names of settings that differ.

    All settings are stored, defaults too: a name missing on one side, in a section that both have, is of another
    version of the program and does not count.
    """

    def differs(name: str) -> bool:
        if name in there and name in here:
            return bool(there[name] != here[name])
        section = f"{name.rpartition('.')[0]}."
        return section == "." or not all(any(k.startswith(section) for k in side) for side in (there, here))

    return [name for name in {**there, **here} if differs(name)]


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def require_same_run(there: LoadedConfig, here: LoadedConfig, folder: Path) -> None:
    """Raise :class:`OIALRError` that names the first setting that must not differ but does."""
    theirs, ours = fixed_settings(there.tree), fixed_settings(here.tree)
    if names := differing(theirs, ours):
        raise OIALRError(
            f"{folder} holds a run with other settings: {names[0]} is {theirs.get(names[0])!r} there, "
            f"{ours.get(names[0])!r} here{_others(names)}; only these may differ: {', '.join(RESUMABLE)}. "
            f"Take another --out, or go on with the run as it is: {RunFolder(folder).resume_command}"
        )


def require_settings(state: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> None:
    """Raise :class:`CheckpointError` with the first setting that differs from those of a checkpoint's ``state``."""
    if "settings" not in state:
        # Older versions stored the seed only.
        then, now = {"train.seed": state["seed"]}, {"train.seed": settings["train.seed"]}
    elif state["settings"]["sha256"] == _sha256(settings):
        return
    else:
        then = {name: value for name, value in state["settings"]["values"].items() if not may_change(name)}
        now = _shareable(settings)
    if names := differing(then, now):
        was, is_now = (repr(side[names[0]]) if names[0] in side else "not set" for side in (then, now))
        raise CheckpointError(
            f"{where} is of another run: {names[0]} was {was} then and is {is_now} now{_others(names)}. Put the "
            "value in config.yaml back, or take that file or checkpoint out of this folder."
        )
    if only := ", ".join(sorted(set(then) ^ set(now))):
        log.warning("%s was written by another version of the program, without or with: %s", where, only)


def require_same_data(state: Mapping[str, Any], samples: Mapping[str, int], where: str) -> None:
    """Raise :class:`CheckpointError` if sizes of data sets differ (their path may change)."""
    for part, then in state.get("samples", samples).items():
        now = samples.get(part, 0)
        if then != now:
            raise CheckpointError(
                f"{where} is of a run on other data: {then:,} {part} samples then, {now:,} now. Name the folder of "
                "the same data."
            )


def require_same_model(here: Mapping[str, Any], there: Mapping[str, Any], where: str) -> None:
    """Raise :class:`CheckpointError` that names the first difference of two models' ``RunContext.identity``."""
    ours, theirs = here["tensors"], there["tensors"]
    if here["class"] != there["class"]:
        difference = f"class {there['class']} there, {here['class']} here"
    elif name := next((n for n in {**ours, **theirs} if ours.get(n) != theirs.get(n)), ""):
        difference = f"{name} is {_tensor_text(theirs.get(name))} there, {_tensor_text(ours.get(name))} here"
    else:
        return
    raise CheckpointError(
        f"{where} is of another model: {difference}. Resume with the model settings of the run's config.yaml."
    )


def _tensor_text(tensor: list[Any] | None) -> str:
    return "missing" if tensor is None else f"{' x '.join(map(str, tensor[0])) or 'a scalar'} {tensor[1]}"


def _sha256(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
