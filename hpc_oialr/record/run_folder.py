"""The files of one run."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_oialr.outputs import require_absent
from hpc_oialr.record.files import to_json, write_atomically
from hpc_oialr.system_errors import read_json


class RunFolder:
    """Paths of a run's files, and how they are written.

    >>> RunFolder("runs/demo").metrics.as_posix()
    'runs/demo/metrics.jsonl'
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"  # the effective configuration
        self.environment = self.path / "environment.json"  # versions and machine
        # One JSON object a line: losses and evaluations; times of every update, and means over its layers.
        self.metrics, self.updates = self.path / "metrics.jsonl", self.path / "updates.jsonl"
        self.spectra = self.path / "spectra.h5"  # singular values of every layer and update
        self.checkpoints, self.logs = self.path / "checkpoints", self.path / "logs"
        self.profile = self.path / "profile"  # traces of some steps, where asked for
        # With which settings the checkpoints may be continued; there from the run's begin.
        self.settings = self.checkpoints / "settings.json"
        self.summary = self.path / "summary.json"  # what came out; written last
        self.job = self.path / "job.json"  # of a submitted run: what was submitted, and as which job
        self.owner = self.path / "owner.json"  # the process that works in the folder now

    @property
    def resume_command(self) -> str:
        """The command that resumes the run."""
        name = str(self.path)
        return f"oialr resume {shlex.quote(f'./{name}' if name.startswith('-') else name)}"

    @property
    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return self.config.exists()

    @property
    def finished(self) -> bool:
        """Whether the run here came to its end."""
        try:
            return isinstance(self.read_summary(), dict)
        except (OSError, ValueError):
            # A damaged summary is written again from the last checkpoint.
            return False

    def require_new(self) -> None:
        """Raise OutputError if a file that a run writes exists, but no run or job has made the folder."""
        if self.holds_run or self.owner.exists() or self.job.exists():
            return
        files = (self.environment, self.metrics, self.updates, self.spectra, self.checkpoints, self.summary)
        names = [path.name for path in (*files, *self.path.glob("spectra.h5.???*"))]
        require_absent(self.path, names, "a run")

    def create(self) -> RunFolder:
        """Make the folder and those inside, readable by their owner only; what exists is kept."""
        for folder in (self.path, self.checkpoints):
            # parents=True gives the mode to the last one only, as it should: parents are shared.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            # A file in its place costs the logs, not the run.
            self.logs.mkdir(mode=0o700, exist_ok=True)
        return self

    def write_config(self, text: str) -> None:
        """Write ``config.yaml``."""
        write_atomically(self.config, text)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write ``checkpoints/settings.json``."""
        write_atomically(self.settings, to_json(settings, indent=1) + "\n")

    def write_environment(self, report: Mapping[str, Any]) -> None:
        """Write ``environment.json``."""
        write_atomically(self.environment, to_json(report, indent=2) + "\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        write_atomically(self.summary, to_json(summary, indent=2) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """What :meth:`write_summary` wrote."""
        summary: dict[str, Any] = read_json(self.summary)
        return summary


def default_folder(recipe: str) -> Path:
    """``runs/RECIPE-TIME``."""
    return Path("runs") / f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
