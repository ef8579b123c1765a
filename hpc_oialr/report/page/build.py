"""Puts the page together and writes it."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from hpc_oialr import __version__
from hpc_oialr.errors import MissingExtraError
from hpc_oialr.outputs import claim, marked, new_file
from hpc_oialr.record.files import to_json
from hpc_oialr.report.figure_data import ratios_to_dense
from hpc_oialr.report.page import tables
from hpc_oialr.report.page.page_data import page_data
from hpc_oialr.report.page.summary_text import sentences
from hpc_oialr.report.runs import Run

SCRIPTS = ("decode.js", "theme.js", "charts.js", "layers.js", "spectrum.js", "runs.js", "page.js")


REPORT = marked("a report page", b"<!DOCTYPE html>", mark=b"hpc_oialr ")


def write_report(runs: Sequence[Run], path: Path, *, force: bool = False) -> Path:
    """Write the page of all runs; whole or not at all.

    Parameters
    ----------
    force
        Replace a file that is no report; see :func:`hpc_oialr.outputs.claim`.

    Raises
    ------
    OutputError
        If the path holds something else than an earlier report.
    MissingExtraError
        Without plotly.
    OSError
        If it cannot be written.
    """
    target = claim(path, REPORT, inputs=[run.folder.path for run in runs], force=force)
    with new_file(target) as draft:
        draft.write_text(page(runs, path), encoding="utf-8")
    return path


def page(runs: Sequence[Run], path: Path) -> str:
    """The page's HTML.

    Parameters
    ----------
    path
        Where it will lie: links to files are relative to it.
    """
    ended = [run for run in runs if run.summary]
    # Of finished runs to the dense one; none where there is nothing to compare.
    ratios = ratios_to_dense(ended) if {run.dense for run in ended} == {True, False} else {}
    library, script = _plotly(), "\n".join(_asset(name) for name in SCRIPTS)
    return Template(_asset("page.html")).substitute(
        policy=content_policy(library, script),
        title=escape(title(runs)),
        style=_asset("page.css"),
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=escape(__version__),
        seen="".join(f"<li>{escape(sentence)}</li>" for sentence in sentences(runs)),
        summary=tables.summary_table(runs),
        differences=tables.difference_table(runs),
        settings=tables.settings(runs),
        environment=tables.environment_table(runs),
        files=tables.file_list(runs, path),
        data="\n".join(data_block(run, ratios.get(run.name)) for run in runs),
        plotly=library,
        script=script,
    )


def title(runs: Sequence[Run]) -> str:
    """Names of the runs, after that of the folder that holds them all, if one does."""
    parents = {run.folder.path.resolve().parent for run in runs}
    where = f"{parents.pop().name}: " if len(parents) == 1 and len(runs) > 1 else ""
    return where + " and ".join(run.name for run in runs)


def data_block(run: Run, ratios: Mapping[str, float] | None) -> str:
    """A run's numbers as JSON that no text in them can close."""
    content = to_json({**page_data(run), "ratios": ratios}).replace("<", "\\u003c")
    return f'<script type="application/json" class="run">{content}</script>'


def content_policy(*scripts: str) -> str:
    """Nothing is fetched from anywhere, and no script runs but those that are named here by their hash."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'none'; form-action 'none'; base-uri 'none'"
    )


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("plotly", "report", purpose="The report page") from error
    # A browser turns line ends into "\n" before it takes the hash.
    return str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")
