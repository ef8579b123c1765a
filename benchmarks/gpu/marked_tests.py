"""The project's tests marked ``gpu``, in a process of their own."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.common import Row
from benchmarks.gpu.runner import Case, Context, NotRunError

ROOT = Path(__file__).resolve().parents[2]
MARKED = re.compile(r"^\s*(?:@|pytestmark\b.*)pytest\.mark\.gpu\b", re.MULTILINE)
OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)


def cases(context: Context) -> Sequence[Case]:
    """One case: ``pytest -m gpu``."""
    return [Case("pytest -m gpu", partial(measure, context))]


def measure(context: Context) -> Iterator[Row]:
    """How many passed, and the names of those that did not."""
    files = marked_files()
    if not files:
        raise NotRunError("no test is marked gpu")
    # Only files with such tests: others may import what a GPU machine does not have.
    chosen = [min(files, key=lambda path: path.stat().st_size)] if context.tiny else files
    yield run_pytest(chosen, context.left_s)


def marked_files(root: Path = ROOT) -> list[Path]:
    """Test files that use the marker."""
    return [path for path in sorted((root / "tests").rglob("test_*.py")) if MARKED.search(path.read_text())]


def run_pytest(files: Sequence[Path], timeout_s: float) -> Row:
    """One row; what a run that was cut off has said until then counts too."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-vv",
        "-m",
        "gpu",
        "-rs",
        "-p",
        "no:cacheprovider",
        "--no-header",
    ]
    begin = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *map(str, files)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=timeout_s,
            check=False,
        )
        output, exit_code = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        output, exit_code = said.decode(errors="replace") if isinstance(said, bytes) else said, None
    outcomes = OUTCOME.findall(output)
    counts = Counter(outcome for _, outcome in outcomes)
    failed = [name for name, outcome in outcomes if outcome in ("FAILED", "ERROR")]
    row: Row = {
        "files": len(files),
        "passed": counts["PASSED"],
        "failed": counts["FAILED"] + counts["ERROR"],
        "skipped": counts["SKIPPED"],
        "exit_code": exit_code,
        "seconds": time.monotonic() - begin,
        "failures": failed,
    }
    if exit_code is None:
        row["cut_off"] = f"after {timeout_s:.0f} s"
    if exit_code not in (0, None) or failed:
        row["output"] = output[-6000:]
    return row
