"""Everything that a finished or running run has left in its folder, as one object."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from hpc_oialr import spectra
from hpc_oialr.errors import DataError
from hpc_oialr.record.metrics import read_metrics
from hpc_oialr.record.run_folder import RunFolder
from hpc_oialr.redaction import mask_tree
from hpc_oialr.spectra import Spectra
from hpc_oialr.spectra.files import record_files
from hpc_oialr.system_errors import read_json, read_text

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A run's numbers over its steps; NaN where one is missing.

    Attributes
    ----------
    step, wall_s, share
        Step, seconds of training so far, and share of the parameters that is trained; shape (points,).
    value
        Loss, or metric; shape (points,).
    name
        Of ``value``.
    """

    step: NDArray[np.int64]
    wall_s: Numbers
    share: Numbers
    value: Numbers
    name: str

    def __len__(self) -> int:
        return len(self.step)


class Run:
    """A run's folder; files that are missing leave their part empty.

    Parameters
    ----------
    path
        The folder, or the ``spectra.h5`` in it.
    name
        What figures call it; default the folder's name.

    Raises
    ------
    DataError
        If no run was begun there and no spectra are there either.
    """

    def __init__(self, path: Path | str, name: str | None = None) -> None:
        path = Path(path)
        self.folder = RunFolder(path if path.is_dir() else path.parent)
        self.name = name or self.folder.path.resolve().name
        self._record = path if path.is_file() else self.folder.spectra
        if not (self.folder.holds_run or record_files(self._record)):
            raise DataError(
                f"{path} holds no run; must be the folder of a run, of oialr compare, or a spectra.h5."
            )

    def __repr__(self) -> str:
        return f"<Run {self.name!r}>"

    @functools.cached_property
    def spectra(self) -> Spectra | None:
        """The record of spectra, None for a run that kept none; close it by :meth:`close`."""
        return spectra.open(self._record) if record_files(self._record) else None

    @functools.cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of ``metrics.jsonl``."""
        return read_metrics(self.folder.metrics) if self.folder.metrics.exists() else []

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """``summary.json``; empty while the run goes on."""
        return _json(self.folder.summary)

    @property
    def environment(self) -> dict[str, Any]:
        """What it ran on."""
        return _json(self.folder.environment) or (self.spectra.environment if self.spectra else {})

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Its settings."""
        import yaml

        if self.folder.config.exists():
            try:
                loaded: dict[str, Any] = yaml.safe_load(read_text(self.folder.config)) or {}
            except yaml.YAMLError as error:
                raise DataError(
                    f"{self.folder.config} is no whole YAML ({' '.join(str(error).split())})."
                ) from None
            # What is shown of it must hold no secret.
            return cast(dict[str, Any], mask_tree(loaded))
        return self.spectra.config if self.spectra else {}

    def choice(self, section: str) -> str | None:
        """Name of the type chosen in a section of the settings, e.g. "model"; None if it is not known."""
        chosen = self.config.get(section)
        return chosen.get("class_path") if isinstance(chosen, dict) else None

    @property
    def dense(self) -> bool:
        """Whether it trained dense throughout."""
        return "oialr" in self.config and self.config["oialr"] is None

    @functools.cached_property
    def losses(self) -> Curve:
        """Training loss."""
        return _curve([row for row in self.metrics if "split" not in row], "loss", "training loss")

    @functools.cached_property
    def evaluations(self) -> Curve:
        """The metric at every evaluation of the split that was evaluated first."""
        rows = [row for row in self.metrics if "metric" in row]
        rows = [row for row in rows if row["split"] == rows[0]["split"]]
        curve = _curve(rows, "metric", rows[0]["metric_name"].replace("_", " ") if rows else "metric")
        shares = self.losses
        if not len(shares):
            return curve
        # An evaluation says nothing of the share: it is that of the last row of losses up to its step.
        at = np.maximum(np.searchsorted(shares.step, curve.step, side="right") - 1, 0)
        return Curve(curve.step, curve.wall_s, shares.share[at], curve.value, curve.name)

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        steps = [row["step"] for row in self.metrics[-1:]]
        if self.spectra is not None and len(self.spectra.events):
            steps.append(int(self.spectra.events["t"].max()))
        return max(steps, default=0)

    def close(self) -> None:
        """Let go of the record's files."""
        if "spectra" in self.__dict__ and self.spectra is not None:
            self.spectra.close()


def find_runs(paths: Iterable[Path | str]) -> list[Run]:
    """The runs of folders; one of ``oialr compare`` holds two.

    Names are the folders', longer where two are equal.

    Raises
    ------
    DataError
        If one of them holds no run, or they are of different tasks or models, which no figure can compare.
    """
    found = [path for given in paths for path in _inside(Path(given))]
    folders = [(path if path.is_dir() else path.parent).resolve() for path in found]
    names = [folder.name for folder in folders]
    longer = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    labels = [each if names.count(name) > 1 else name for name, each in zip(names, longer, strict=True)]
    runs = [Run(path, label) for path, label in zip(found, labels, strict=True)]
    for section in ("task", "model"):
        chosen = {run.name: run.choice(section) for run in runs if run.choice(section)}
        if len(set(chosen.values())) > 1:
            told = ", ".join(f"{name} {choice}" for name, choice in chosen.items())
            raise DataError(f"the runs are of different {section}s: {told}. Make a report for each.")
    return runs


def dense_of(runs: Iterable[Run]) -> Run | None:
    """The first dense run."""
    return next((run for run in runs if run.dense), None)


def _inside(path: Path) -> list[Path]:
    sides = [path / side for side in ("dense", "oialr")]
    if RunFolder(path).holds_run or not all(RunFolder(side).holds_run for side in sides):
        return [path]
    return sides


def _curve(rows: list[dict[str, Any]], key: str, name: str) -> Curve:
    def column(field: str) -> Numbers:
        values = (row.get(field) for row in rows)
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    steps = np.array([row["step"] for row in rows], dtype=np.int64)
    return Curve(steps, column("wall_s"), column("trained_share"), column(key), name)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content = read_json(path)
    return content if isinstance(content, dict) else {}
