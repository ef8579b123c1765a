"""Where everything of one run lies."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_oialr.outputs import require_absent
from hpc_oialr.record.files import to_json, write_atomically
from hpc_oialr.system_errors import read_json


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files, and how they are written.

    Attributes
    ----------
    path
        The folder.

    Examples
    --------
    >>> RunFolder("runs/demo").metrics.as_posix()
    'runs/demo/metrics.jsonl'
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    @property
    def config(self) -> Path:
        """The effective configuration."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions and machine."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def updates(self) -> Path:
        """Times of every event of the method, and means over its layers; one JSON object a line."""
        return self.path / "updates.jsonl"

    @property
    def spectra(self) -> Path:
        """Singular values of every layer and update."""
        return self.path / "spectra.h5"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Folder of log files."""
        return self.path / "logs"

    @property
    def summary(self) -> Path:
        """What came out; written last."""
        return self.path / "summary.json"

    @property
    def job(self) -> Path:
        """What was submitted to do this run, and as which job; there for submitted runs only."""
        return self.path / "job.json"

    @property
    def owner(self) -> Path:
        """Who works in the folder now; there while somebody does."""
        return self.path / "owner.json"

    @property
    def resume_command(self) -> str:
        """What to type to go on with the run."""
        name = str(self.path)
        return f"oialr resume {shlex.quote(f'./{name}' if name.startswith('-') else name)}"

    @property
    def settings(self) -> Path:
        """Of which settings the checkpoints must be; there from the run's begin."""
        return self.checkpoints / "settings.json"

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
            # A damaged summary is made anew from the last checkpoint.
            return False

    def require_new(self) -> None:
        """See that a run can begin here without writing over anything.

        Raises
        ------
        OutputError
            If a file of a name that a run writes is there, and no run or job has made the folder.
        """
        if not (self.holds_run or self.owner.exists() or self.job.exists()):
            written = (
                self.environment,
                self.metrics,
                self.updates,
                self.spectra,
                self.checkpoints,
                self.summary,
                *self.path.glob("spectra.h5.???*"),
            )
            require_absent(self.path, [path.name for path in written], "a run")

    def create(self) -> RunFolder:
        """Make the folder and those inside, readable by their owner only; what exists is kept."""
        for folder in (self.path, self.checkpoints):
            # parents=True would give the mode to the last one only, which is meant: parents are shared.
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
