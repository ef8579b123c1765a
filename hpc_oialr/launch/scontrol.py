"""What Slurm says of the job that asks, by its own program ``scontrol``."""

from __future__ import annotations

import re
from datetime import datetime

from hpc_oialr.launch.programs import NoAnswerError, ask

# A value goes on, blanks and all, to the next name.
_FIELD = re.compile(r"(?:^|\s)([A-Z][\w:/]*)=(.*?)(?=\s[A-Z][\w:/]*=|$)")


def show_job(job: str) -> dict[str, str]:
    """Fields of a job, e.g. ``{"JobState": "RUNNING", "EndTime": "2026-11-24T12:00:00", ...}``.

    Nothing where ``scontrol`` is missing, as inside most
    containers, or does not answer.
    """
    try:
        said = ask(["scontrol", "--oneliner", "show", "job", job]).stdout
    except NoAnswerError:
        return {}
    return dict(_FIELD.findall(said.strip()))


def end_of(job: str) -> float | None:
    """Unix time at which Slurm will end a job (s); None if it will not, or does not say."""
    try:
        return datetime.fromisoformat(show_job(job).get("EndTime", "")).timestamp()
    except ValueError:
        return None
