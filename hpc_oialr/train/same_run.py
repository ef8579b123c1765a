"""Which settings make a run the one it is, and which may change when it is resumed."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from hpc_oialr.errors import CheckpointError
from hpc_oialr.redaction import mask_tree
from hpc_oialr.train.config_tree import flat

log = logging.getLogger(__name__)

# Where, by whom and from which disk it is computed, and how often it is saved: not what is computed. ``dense`` holds
# the settings of another run, the dense twin's. This list is the only one.
RESUMABLE = (
    "engine",
    "train.device",
    "train.timeout_s",
    "train.stop_signal",
    "train.health_check",
    "train.workers",
    "checkpoint",
    "data.path",
    "data.data_dir",
    "record.side_folder",
    "record.spectra_writer",
    "dense",
)


def may_change(name: str) -> bool:
    """Whether a setting may change when a run is resumed."""
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in RESUMABLE)


def fixed_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that may not change, by dotted name, as JSON holds them."""
    fixed: dict[str, Any] = json.loads(
        json.dumps({name: value for name, value in flat(tree).items() if not may_change(name)}, default=str)
    )
    return fixed


def stored(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of them; it may be passed on, so secrets are masked."""
    return {"sha256": _sha256(settings), "values": _shareable(settings)}


def _shareable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without secrets, and still different where they are."""
    masked = {name: mask_tree(value, name) for name, value in settings.items()}
    return {
        name: value if value == settings[name] else f"{value} #{_sha256({name: settings[name]})[:8]}"
        for name, value in masked.items()
    }


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Names of settings that differ; a name that one version of the program has and the other has not does not count.

    Every setting is stored, defaults too: a name that is missing on one side, in a section that both have, came or
    went with a version.
    """
    names = []
    for name in {**there, **here}:
        if name in there and name in here:
            same = there[name] == here[name]
        else:
            section = f"{name.rpartition('.')[0]}."
            same = section != "." and all(
                any(key.startswith(section) for key in side) for side in (there, here)
            )
        if not same:
            names.append(name)
    return names


def require_settings(state: Mapping[str, Any], settings: Mapping[str, Any], where: str) -> None:
    """See that a checkpoint is of this run.

    Parameters
    ----------
    state
        Of the checkpoint; one of an older version tells its seed only.
    where
        Path of the checkpoint.

    Raises
    ------
    CheckpointError
        With the first setting that differs, its value then and now.
    """
    known = state.get("settings")
    then: Mapping[str, Any]
    now: Mapping[str, Any]
    if known is None:
        then, now = {"train.seed": state["seed"]}, {"train.seed": settings["train.seed"]}
    elif known["sha256"] == _sha256(settings):
        return
    else:
        then, now = known["values"], _shareable(settings)
    names = differing(then, now)
    if names:
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise CheckpointError(
            f"{where} is of another run: {names[0]} was {_shown(then, names[0])} then and is "
            f"{_shown(now, names[0])} now{more}. Put the value in config.yaml back, or take "
            "that file or checkpoint out of this folder."
        )
    if only := sorted(set(then) ^ set(now)) if known is not None else []:
        log.warning(
            "%s was written by another version of the program, without or with: %s", where, ", ".join(only)
        )


def require_same_data(state: Mapping[str, Any], samples: Mapping[str, int], where: str) -> None:
    """Raise :class:`CheckpointError` if the data sets have other sizes now, since their path may change."""
    for part, then in state.get("samples", samples).items():
        now = samples.get(part, 0)
        if then != now:
            raise CheckpointError(
                f"{where} is of a run on other data: {then:,} {part} samples then, {now:,} now. Name the folder of "
                "the same data."
            )


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "not set"


def _sha256(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
