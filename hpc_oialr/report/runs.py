"""What a finished or running run has left in its folder, as one object."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
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
    """A loss or metric over a run's steps, with the seconds of training so far and the share of trained parameters.

    All arrays have the shape (points,); NaN where a number is missing.
    """

    name: str
    step: NDArray[np.int64]
    wall_s: Numbers
    share: Numbers
    value: Numbers

    def __len__(self) -> int:
        return len(self.step)


def _curve(rows: list[dict[str, Any]], key: str, name: str) -> Curve:
    def column(field: str) -> Numbers:
        values = (row.get(field) for row in rows)
        return np.array([math.nan if value is None else value for value in values], dtype=np.float64)

    steps = np.array([row["step"] for row in rows], dtype=np.int64)
    return Curve(name, steps, column("wall_s"), column("trained_share"), column(key))


def _json(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.exists() else None
    return content if isinstance(content, dict) else {}


class Run:
    """A run's folder, or the ``spectra.h5`` in it; files that are missing leave their part empty.

    ``name`` is what figures call it, by default the folder's name. Raises :class:`DataError` if there is neither a
    run nor a record of spectra.
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
        """Versions and machine."""
        return _json(self.folder.environment) or (self.spectra.environment if self.spectra else {})

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """Its settings, with secrets masked."""
        path = self.folder.config
        if not path.exists():
            return self.spectra.config if self.spectra else {}
        try:
            return cast(dict[str, Any], mask_tree(yaml.safe_load(read_text(path)) or {}))
        except yaml.YAMLError as error:
            raise DataError(f"{path} is no whole YAML ({' '.join(str(error).split())}).") from None

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
        losses = self.losses
        if not len(losses):
            return curve
        # Rows of evaluations have no share: it is that of the last row of losses up to their step.
        at = np.maximum(np.searchsorted(losses.step, curve.step, side="right") - 1, 0)
        return replace(curve, share=losses.share[at])

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        steps = [row["step"] for row in self.metrics[-1:]]
        if self.spectra is not None and len(self.spectra.events):
            steps.append(int(self.spectra.events["t"].max()))
        return max(steps, default=0)

    def close(self) -> None:
        """Close the record's files."""
        if "spectra" in self.__dict__ and self.spectra is not None:
            self.spectra.close()


def find_runs(paths: Iterable[Path | str]) -> list[Run]:
    """The runs of folders, two in one of ``oialr compare``; names are the folders', longer where two are equal.

    Raises
    ------
    DataError
        If one of them holds no run, or they are of different tasks or models, which no figure can compare.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        sides = [path / "dense", path / "oialr"]
        compared = not RunFolder(path).holds_run and all(RunFolder(side).holds_run for side in sides)
        found += sides if compared else [path]
    folders = [(path if path.is_dir() else path.parent).resolve() for path in found]
    names = [folder.name for folder in folders]
    longer = [f"{folder.parent.name}/{folder.name}" for folder in folders]
    labels = [each if names.count(name) > 1 else name for name, each in zip(names, longer, strict=True)]
    runs = [Run(path, label) for path, label in zip(found, labels, strict=True)]
    for section in ("task", "model"):
        settings = {run.name: run.config.get(section) for run in runs}
        chosen = {
            name: each["class_path"]
            for name, each in settings.items()
            if isinstance(each, dict) and "class_path" in each
        }
        if len(set(chosen.values())) > 1:
            told = ", ".join(f"{name} {choice}" for name, choice in chosen.items())
            raise DataError(f"the runs are of different {section}s: {told}. Make a report for each.")
    return runs


def dense_of(runs: Iterable[Run]) -> Run | None:
    """The first dense run."""
    return next((run for run in runs if run.dense), None)
