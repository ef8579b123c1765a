"""Tables of the page, as HTML; every text in them is escaped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hpc_oialr.report.page.summary_text import metric_text
from hpc_oialr.report.runs import Run

NOTHING = "\N{EM DASH}"


def table(
    caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, marked: Iterable[int] = ()
) -> str:
    """A table that scrolls by itself where it is too wide.

    Parameters
    ----------
    head
        Titles of columns; the first column names the rows.
    rows
        Cells.
    marked
        Numbers of rows that are set off.
    """
    set_off = set(marked)
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    body = "".join(_row(row, marked=number in set_off) for number, row in enumerate(rows))
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def summary_table(runs: Sequence[Run]) -> str:
    """One row a run."""
    head = (
        "run",
        "metric",
        "training time",
        "steps",
        "trained",
        "peak memory",
        "updates",
        "processes",
        "seed",
    )
    return table("All runs", head, [_summary(run) for run in runs])


def difference_table(runs: Sequence[Run]) -> str:
    """Settings that are not the same in all runs."""
    rows = side_by_side([flat(run.config) for run in runs])
    different = [(name, *cells) for name, cells in rows if len(set(cells)) > 1]
    if len(runs) < 2:
        return "<p>There is one run only; nothing to compare its settings with.</p>"
    if not different:
        return "<p>All settings are equal.</p>"
    head = ("setting", *(run.name for run in runs))
    return table("Settings that differ", head, different)


def environment_table(runs: Sequence[Run]) -> str:
    """What the runs ran on; rows that differ are set off."""
    rows = side_by_side([flat(run.environment) for run in runs])
    known = [(name, cells) for name, cells in rows if set(cells) != {NOTHING}]
    marked = [number for number, (_, cells) in enumerate(known) if len(set(cells)) > 1]
    named = [
        (f"{name} (differs)" if number in marked else name, *cells)
        for number, (name, cells) in enumerate(known)
    ]
    return table("What the runs ran on", ("", *(run.name for run in runs)), named, marked=marked)


def settings(runs: Sequence[Run]) -> str:
    """All settings of each run, folded away."""
    import yaml

    def fold(run: Run) -> str:
        text = escape(yaml.safe_dump(run.config, sort_keys=False))
        title = f"All settings of {escape(run.name)}"
        return f'<details><summary>{title}</summary><pre tabindex="0">{text}</pre></details>'

    return "".join(fold(run) for run in runs if run.config)


def file_list(runs: Sequence[Run], page: Path) -> str:
    """Links to the runs' files, relative to the page."""
    return "".join(
        f"<h3>{escape(run.name)}</h3><ul class='files'>{''.join(_link(path, page) for path in _files(run))}</ul>"
        for run in runs
    )


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


def _row(cells: Sequence[str], *, marked: bool) -> str:
    first, *rest = cells
    others = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
    kind = ' class="marked"' if marked else ""
    return f'<tr{kind}><th scope="row">{escape(first)}</th>{others}</tr>'


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


def _files(run: Run) -> list[Path]:
    folder = run.folder
    names = (
        folder.config,
        folder.environment,
        folder.metrics,
        folder.updates,
        folder.spectra,
        folder.summary,
        folder.job,
        folder.path.parent / "compare.json",
        folder.checkpoints,
        folder.logs,
    )
    return [path for path in names if path.exists()]


def _link(path: Path, page: Path) -> str:
    # The file system's own form of the way from one to the other; a link of the page wants "/".
    way = Path(os.path.relpath(path.resolve(), page.resolve().parent)).as_posix()
    return f'<li><a href="{quote(way)}">{escape(path.name)}</a></li>'
