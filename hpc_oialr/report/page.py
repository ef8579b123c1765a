"""The report page: one HTML file that holds everything it shows; every text in it is escaped."""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import yaml

from hpc_oialr import __version__
from hpc_oialr.errors import MissingExtraError
from hpc_oialr.outputs import claim, marked, new_file
from hpc_oialr.record.files import to_json
from hpc_oialr.report.figure_data import ratios_to_dense
from hpc_oialr.report.page_data import page_data
from hpc_oialr.report.runs import Run
from hpc_oialr.report.summary_text import metric_text, sentences

SCRIPTS = ("decode.js", "theme.js", "charts.js", "layers.js", "spectrum.js", "runs.js", "page.js")
REPORT = marked("a report page", b"<!DOCTYPE html>", mark=b"hpc_oialr ")
NOTHING = "\N{EM DASH}"


def write_report(runs: Sequence[Run], path: Path, *, force: bool = False) -> Path:
    """Write the page of all runs; whole or not at all.

    ``force`` replaces a file that is no report, see :func:`hpc_oialr.outputs.claim`. Raises OutputError without it,
    MissingExtraError without plotly, and OSError if the page cannot be written.
    """
    target = claim(path, REPORT, inputs=[run.folder.path for run in runs], force=force)
    with new_file(target) as draft:
        draft.write_text(page(runs, path), encoding="utf-8")
    return path


def page(runs: Sequence[Run], path: Path) -> str:
    """The page's HTML; links to files are relative to ``path``, where it will lie."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingExtraError("plotly", "report", purpose="The report page") from error
    # A browser turns line ends into "\n" before it takes the hash.
    plotly = str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")
    script = "\n".join(_asset(name) for name in SCRIPTS)
    ended = [run for run in runs if run.summary]
    # Of finished runs to the dense one; none where there is nothing to compare.
    ratios = ratios_to_dense(ended) if {run.dense for run in ended} == {True, False} else {}
    data = []
    for run in runs:
        # No text in the numbers can close the block.
        content = to_json({**page_data(run), "ratios": ratios.get(run.name)}).replace("<", "\\u003c")
        data.append(f'<script type="application/json" class="run">{content}</script>')
    parents = {run.folder.path.resolve().parent for run in runs}
    where = f"{parents.pop().name}: " if len(parents) == 1 and len(runs) > 1 else ""
    return Template(_asset("page.html")).substitute(
        policy=content_policy(plotly, script),
        title=escape(where + " and ".join(run.name for run in runs)),
        style=_asset("page.css"),
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=escape(__version__),
        seen="".join(f"<li>{escape(sentence)}</li>" for sentence in sentences(runs)),
        summary=summary_table(runs),
        differences=difference_table(runs),
        settings="".join(_all_settings(run) for run in runs if run.config),
        environment=environment_table(runs),
        files="".join(file_list(run, path) for run in runs),
        data="\n".join(data),
        plotly=plotly,
        script=script,
    )


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")


def content_policy(*scripts: str) -> str:
    """Nothing is fetched from anywhere, and no script runs but these, by their hashes."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'none'; form-action 'none'; base-uri 'none'"
    )


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, marked: Collection[int] = ()
) -> str:
    """A table that scrolls by itself where it is too wide; the first column names the rows, some are ``marked``."""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    body = ""
    for number, (first, *rest) in enumerate(rows):
        kind = ' class="marked"' if number in marked else ""
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        body += f'<tr{kind}><th scope="row">{escape(first)}</th>{cells}</tr>'
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def summary_table(runs: Sequence[Run]) -> str:
    """One row a run."""
    head = (
        *("run", "metric", "training time", "steps", "trained"),
        *("peak memory", "updates", "processes", "seed"),
    )
    return table("All runs", head, [_summary(run) for run in runs])


def _summary(run: Run) -> tuple[str, ...]:
    summary = run.summary
    if not summary:
        state = "has not ended" if run.folder.holds_run else "not known"
        return (run.name, state, "", f"{run.last_step:,}", "", "", "", "", "")
    name = summary["metric_name"]
    share = summary["trainable_params"] / summary["dense_trainable_params"]
    return (
        run.name,
        f"{name.replace('_', ' ')} {metric_text(summary['metric'], name)}",
        f"{summary['wall_s']:,.1f} s",
        f"{summary['steps']:,}",
        f"{summary['trainable_params']:,} ({share:.1%})",
        f"{1024 * summary['peak_memory_gib']:,.0f} MiB",
        f"{summary['update_wall_s']:.2f} s",
        str(summary["world_size"]),
        str(summary["seed"]),
    )


def difference_table(runs: Sequence[Run]) -> str:
    """Settings that are not the same in all runs."""
    if len(runs) < 2:
        return "<p>There is one run only; nothing to compare its settings with.</p>"
    rows = side_by_side([flat(run.config) for run in runs])
    different = [(name, *cells) for name, cells in rows if len(set(cells)) > 1]
    if not different:
        return "<p>All settings are equal.</p>"
    return table("Settings that differ", ("setting", *(run.name for run in runs)), different)


def environment_table(runs: Sequence[Run]) -> str:
    """What the runs ran on; rows that differ are marked."""
    rows = side_by_side([flat(run.environment) for run in runs])
    known = [(name, cells) for name, cells in rows if set(cells) != {NOTHING}]
    differ = [number for number, (_, cells) in enumerate(known) if len(set(cells)) > 1]
    named = [
        (f"{name} (differs)" if number in differ else name, *cells)
        for number, (name, cells) in enumerate(known)
    ]
    return table("What the runs ran on", ("", *(run.name for run in runs)), named, marked=differ)


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted names and values as text.

    Examples
    --------
    >>> flat({"train": {"steps": 5, "clip": None}, "compile": False})
    {'train.steps': '5', 'train.clip': '—', 'compile': 'False'}
    """
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = NOTHING if value is None else str(value)
    return found


def side_by_side(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, tuple[str, ...]]]:
    """Rows of all names in the order in which they appear."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, tuple(column.get(name, NOTHING) for column in columns)) for name in names]


def _all_settings(run: Run) -> str:
    text, title = escape(yaml.safe_dump(run.config, sort_keys=False)), escape(run.name)
    return f'<details><summary>All settings of {title}</summary><pre tabindex="0">{text}</pre></details>'


def file_list(run: Run, page: Path) -> str:
    """Links to a run's files, relative to the page."""
    folder, links = run.folder, ""
    for path in (
        *(folder.config, folder.environment, folder.metrics, folder.updates, folder.spectra),
        *(folder.summary, folder.job, folder.path.parent / "compare.json", folder.checkpoints, folder.logs),
    ):
        if path.exists():
            # The file system's own form of the way from one to the other; a link of the page wants "/".
            way = Path(os.path.relpath(path.resolve(), page.resolve().parent)).as_posix()
            links += f'<li><a href="{quote(way)}">{escape(path.name)}</a></li>'
    return f"<h3>{escape(run.name)}</h3><ul class='files'>{links}</ul>"
