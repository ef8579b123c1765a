"""A run's numbers in an experiment tracker too, by Accelerate's classes; the run folder stays the truth."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hpc_oialr.distributed.slurm import slurm_job
from hpc_oialr.errors import MissingExtraError, OIALRError, UnknownNameError
from hpc_oialr.method.report import UpdateReport
from hpc_oialr.record.files import to_json, write_atomically
from hpc_oialr.record.run_folder import RunFolder

log = logging.getLogger(__name__)

# Accelerate's names, which are also those of the packages.
TRACKERS = {"comet": "comet_ml", **{name: name for name in ("mlflow", "tensorboard", "trackio", "wandb")}}


def check_tracker(name: str) -> None:
    """Raise UnknownNameError unless ``name`` is a tracker."""
    if name not in TRACKERS:
        raise UnknownNameError("record.tracker", name, TRACKERS)


def require_tracker(name: str) -> None:
    """Raise an error with the install line unless the tracker's package and accelerate are installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtraError("accelerate", "trackers", purpose=f"record.tracker: {name}")
    package = TRACKERS[name]
    if importlib.util.find_spec(package) is None:
        raise OIALRError(f"record.tracker is {name!r}, whose package is not installed: pip install {package}")


class RunTracker:
    """Sends rows to a tracker; a run that is resumed continues the same one.

    A tracker that fails is given up with a warning: it never ends the training. Only rank 0 has one. In a Slurm job
    wandb and comet work offline, unless WANDB_MODE or COMET_START_ONLINE says otherwise.

    Parameters
    ----------
    name
        One of :data:`TRACKERS`.
    folder
        ``tracker.json`` there holds the id of the tracker's run; local files of trackers are in ``logs/``.
    settings
        By dotted name; numbers and texts of them describe the run.
    project
        Under which the tracker lists the run.
    step
        Steps done before.
    """

    def __init__(self, name: str, folder: RunFolder, settings: Mapping[str, Any], *, project: str, step: int) -> None:
        self.name, self._folder, self._tracker = name, folder, None
        with self._survived("start"):
            self._tracker = self._start(settings, project, step)

    @contextmanager
    def _survived(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = None
            log.warning(
                "the tracker %s failed to %s and gets nothing more (%s: %s); the run goes on, and %s has all numbers.",
                *(self.name, what, type(error).__name__, error, self._folder.path),
            )

    def _start(self, settings: Mapping[str, Any], project: str, step: int) -> Any:
        from accelerate import tracking

        # Accelerate's logger needs an Accelerator, which a run of our own does not have.
        tracking.logger = logging.getLogger(tracking.__name__)
        path = self._folder.path / "tracker.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        run = known.get("id") if known.get("tracker") == self.name else None
        tracker = tracking.LOGGER_TYPE_TO_CLASS[TRACKERS[self.name]](**self._options(project, run, step))
        # The decorators of its methods ask an Accelerator, too.
        tracker.main_process_only = False
        tracker.start()
        self._tracker = tracker
        if run is None:
            if self.name != "tensorboard":
                tracker.store_init_configuration(
                    {k: v for k, v in settings.items() if isinstance(v, (int, float, str))}
                )
            run = self._id if self.name != "mlflow" else tracker.tracker.info.run_id
            write_atomically(path, to_json({"tracker": self.name, "id": run, "project": project}) + "\n")
        return tracker

    def _options(self, project: str, run: str | None, step: int) -> dict[str, Any]:
        """Arguments of accelerate's class: the run ``run`` is continued, or a new one begun."""
        logs, name, offline = self._folder.logs.absolute(), self._folder.path.absolute().name, slurm_job() is not None
        self._id = run or uuid.uuid4().hex
        match self.name:
            case "tensorboard":
                # What an earlier run wrote of later steps is hidden.
                return {"run_name": "", "logging_dir": str(logs), "purge_step": step + 1}
            case "wandb":
                if offline:
                    os.environ.setdefault("WANDB_MODE", "offline")
                return {"run_name": project, "name": name, "id": self._id, "resume": "allow", "dir": str(logs)}
            case "trackio":
                return {"run_name": project, "name": name, "resume": "allow"}
            case "mlflow":
                os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{logs / 'mlflow.db'}")
                return {"experiment_name": project, "logging_dir": str(logs), "run_id": run, "run_name": name}
            case _:
                if offline:
                    os.environ.setdefault("COMET_START_ONLINE", "0")
                os.environ.setdefault("COMET_OFFLINE_DIRECTORY", str(logs))
                return {"run_name": project, "experiment_key": self._id}

    def write(self, row: Mapping[str, Any]) -> None:
        """Send every number of a row of ``metrics.jsonl``; its ``split``, or "train", leads the names."""
        prefix = row.get("split", "train")
        self._log({f"{prefix}/{name}": value for name, value in _numbers(row).items()}, row["step"])

    def update(self, row: Mapping[str, Any], report: UpdateReport) -> None:
        """Send what the method did in a step: times and means, r and stability of each layer."""
        values = {f"update/{name}": value for name, value in _numbers(row).items()}
        values |= _numbers({f"r/{layer.name}": layer.r for layer in report.layers})
        values |= _numbers({f"stability/{layer.name}": layer.stability for layer in report.layers})
        self._log(values, report.t)

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if self._tracker is not None:
            with self._survived("log"):
                self._tracker.log(dict(values), step=step)

    def close(self) -> None:
        """End the tracker's run."""
        if self._tracker is not None:
            with self._survived("finish"):
                self._tracker.finish()
        self._tracker = None


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row but its step; NaN is left out, which some trackers refuse."""
    numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
    return {k: v for k, v in numbers.items() if k not in ("step", "total_steps") and not math.isnan(v)}
