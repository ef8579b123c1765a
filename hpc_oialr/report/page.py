"""The report page: one self-contained HTML file; all text in it is escaped."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np
import yaml

from hpc_oialr import __version__
from hpc_oialr.errors import MissingExtraError
from hpc_oialr.outputs import claim, marked, new_file
from hpc_oialr.record.files import to_json
from hpc_oialr.report.page_data import page_data
from hpc_oialr.report.runs import Run, conversions, dense_of, pareto_fronts, ratios_to_dense, settling_steps
from hpc_oialr.spectra import Spectra
from hpc_oialr.train.load_config import flat

SCRIPTS = ("decode.js", "theme.js", "charts.js", "layers.js", "spectrum.js", "runs.js", "page.js")
REPORT = marked("a report page", b"<!DOCTYPE html>", mark=b"hpc_oialr ")
NOTHING = "\N{EM DASH}"
# The stability above which a layer counts as settled.
STABLE = 0.95


def write_report(runs: Sequence[Run], path: Path, *, force: bool = False) -> Path:
    """Write the page of all runs atomically.

    ``force`` replaces a file that is not a report, see :func:`hpc_oialr.outputs.claim`. Raises OutputError without it,
    MissingExtraError without plotly, and OSError if the page cannot be written.
    """
    target = claim(path, REPORT, inputs=[run.folder.path for run in runs], force=force)
    with new_file(target) as draft:
        draft.write_text(page(runs, path), encoding="utf-8")
    return path


def page(runs: Sequence[Run], path: Path) -> str:
    """The page's HTML; links to files are relative to ``path``, where it will be."""
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
    fronts = f'<script type="application/json" id="pareto">{_inside(pareto_fronts(runs))}</script>'
    data = [fronts]
    for run in runs:
        content = _inside({**page_data(run), "ratios": ratios.get(run.name)})
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
        settings="".join(
            f"<details><summary>All settings of {escape(run.name)}</summary>"
            f'<pre tabindex="0">{escape(yaml.safe_dump(run.config, sort_keys=False))}</pre></details>'
            for run in runs
            if run.config
        ),
        environment=environment_table(runs),
        files="".join(file_list(run, path) for run in runs),
        data="\n".join(data),
        plotly=plotly,
        script=script,
    )


def _inside(data: Mapping[str, Any]) -> str:
    """JSON inside the page: no text in it can close the block."""
    return to_json(data).replace("<", "\\u003c")


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


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide; the first column names the rows."""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        body += f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>'
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def summary_table(runs: Sequence[Run]) -> str:
    """One row a run."""
    head = "run", "metric", "training time", "steps", "trained", "peak memory", "updates", "processes", "seed"
    rows: list[tuple[str, ...]] = []
    for run in runs:
        summary = run.summary
        if not summary:
            state = "has not ended" if run.folder.holds_run else "not known"
            rows.append((run.name, state, "", f"{run.last_step:,}", *[""] * 5))
            continue
        cells = (
            _metric(summary),
            f"{summary['wall_s']:,.1f} s",
            f"{summary['steps']:,}",
            f"{summary['trainable_params']:,} ({_trained(summary):.1%})",
            f"{1024 * summary['peak_memory_gib']:,.0f} MiB",
            f"{summary['update_wall_s']:.2f} s",
            str(summary["world_size"]),
            str(summary["seed"]),
        )
        rows.append((run.name, *cells))
    return table("All runs", head, rows)


def difference_table(runs: Sequence[Run]) -> str:
    """Settings that are not the same in all runs."""
    if len(runs) < 2:
        return "<p>There is one run only; nothing to compare its settings with.</p>"
    rows = side_by_side([run.config for run in runs])
    different = [(name, *cells) for name, cells in rows if len(set(cells)) > 1]
    if not different:
        return "<p>All settings are equal.</p>"
    return table("Settings that differ", ("setting", *(run.name for run in runs)), different)


def environment_table(runs: Sequence[Run]) -> str:
    """What the runs ran on; rows that differ say so."""
    rows = [
        (name if len(set(cells)) == 1 else f"{name} (differs)", *cells)
        for name, cells in side_by_side([run.environment for run in runs])
        if set(cells) != {NOTHING}
    ]
    return table("What the runs ran on", ("", *(run.name for run in runs)), rows)


def side_by_side(settings: Iterable[Mapping[str, Any]]) -> list[tuple[str, tuple[str, ...]]]:
    """Rows of all dotted names in the order in which they appear, with a value as text from each."""
    columns = [flat(each) for each in settings]
    names = dict.fromkeys(name for column in columns for name in column)
    values = {name: [column.get(name) for column in columns] for name in names}
    return [(name, tuple(NOTHING if v is None else str(v) for v in row)) for name, row in values.items()]


def file_list(run: Run, page: Path) -> str:
    """Links to a run's files, relative to the page."""
    folder, links = run.folder, ""
    kept = [folder.config, folder.environment, folder.metrics, folder.updates, folder.spectra, folder.summary]
    kept += [folder.job, folder.path.parent / "compare.json", folder.checkpoints, folder.logs]
    for path in kept:
        if path.exists():
            # A link needs "/", whatever the file system has.
            relative = Path(os.path.relpath(path.resolve(), page.resolve().parent)).as_posix()
            links += f'<li><a href="{quote(relative)}">{escape(path.name)}</a></li>'
    return f"<h3>{escape(run.name)}</h3><ul class='files'>{links}</ul>"


def sentences(runs: Sequence[Run]) -> Iterator[str]:
    """The results of the runs in sentences."""
    dense = dense_of(runs)
    if len(runs) > 2 and (found := pareto_fronts(runs)):
        for price, front in found["fronts"].items():
            names = ", ".join(found["runs"][i] for i in front)
            yield f"By {found['metric']} and {price.partition(' (')[0]} no other run beats: {names}."
    for run in runs:
        yield _result(run)
        if dense is not None and run is not dense and run.summary and dense.summary:
            yield _against(run, dense)
        if run.spectra is not None and len(run.spectra.events):
            yield from _stability(run.name, run.spectra)
            yield from _inner_dimensions(run.name, run.spectra)


def metric_text(value: float, name: str) -> str:
    """Accuracies in per cent, other metrics with four decimals."""
    return f"{100 * value:.2f} %" if name.endswith("accuracy") else f"{value:.4f}"


def _metric(summary: Mapping[str, Any]) -> str:
    name = summary["metric_name"]
    return f"{name.replace('_', ' ')} {metric_text(summary['metric'], name)}"


def _trained(summary: Mapping[str, Any]) -> float:
    return float(summary["trainable_params"] / summary["dense_trainable_params"])


def _result(run: Run) -> str:
    summary = run.summary
    if not run.folder.holds_run:
        return f"{run.name} is a record of spectra alone, up to step {run.last_step:,}."
    if not summary:
        return f"{run.name} has not ended: {run.last_step:,} steps so far."
    return (
        f"{run.name}: {_metric(summary)} after {summary['steps']:,} steps and {summary['wall_s']:.0f} s of training; "
        f"{_trained(summary):.1%} of the parameters are trained at the end."
    )


def _against(run: Run, dense: Run) -> str:
    own, other, curve = run.summary, dense.summary, dense.evaluations
    text = (
        f"Against {dense.name}, {run.name} took {own['wall_s'] / other['wall_s']:.2f} of the time and "
        f"{own['peak_memory_gib'] / other['peak_memory_gib']:.2f} of the peak memory"
    )
    if len(curve):
        name, at = own["metric_name"], curve.at(own["wall_s"])
        text += f", and ended at {metric_text(own['metric'], name)} where {dense.name} ended at "
        text += metric_text(other["metric"], name)
        text += ", which had not been evaluated" if at is None else f" and stood at {metric_text(at, name)}"
        text += " after the same time"
    return f"{text}."


def _stability(name: str, record: Spectra) -> Iterator[str]:
    if settled := settling_steps(record, STABLE):
        steps = [step for step in settled.values() if math.isfinite(step)]
        text = f"In {name}, the stability of {len(steps)} of {len(settled)} layers stays above {STABLE:g}"
        if steps:
            text += f", of half of these from step {np.median(steps):,.0f} on, of all from step {max(steps):,.0f}"
        yield f"{text}."


def _inner_dimensions(name: str, record: Spectra) -> Iterator[str]:
    if converted := conversions(record.values()):
        when = " to ".join(f"{step:,}" for step in dict.fromkeys((converted[0], converted[-1])))
        shares = {layer.name: layer.r[-1] / layer.k for layer in record.values() if len(layer)}
        least = min(shares, key=lambda each: shares[each])
        yield (
            f"{name} was converted at step {when}; r is {np.mean(list(shares.values())):.1%} of k at the end in the mean "
            f"of its layers, and {shares[least]:.1%} in {least}, where it is least."
        )
