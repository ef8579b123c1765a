from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Goes on after its output has failed, and says so by a file.
PROGRAM = """
import sys
from pathlib import Path
from hpc_oialr.streams import tolerate_output_failures
tolerate_output_failures()
for number in range(20_000):
    sys.stdout.write(f"line {number} \\u2192\\n")
sys.stdout.flush()
sys.stderr.write("an error\\n")
sys.stderr.flush()
Path(sys.argv[1]).write_text("went on")
"""


@pytest.mark.parametrize(
    ("shell", "variables"),
    [
        ("{} | head -n 1", {}),
        ("{} > /dev/full", {}),
        ("{} > /dev/null 2> /dev/full", {}),
        ("{} >&- 2>&-", {}),
        ("{} > /dev/null", {"PYTHONIOENCODING": "ascii"}),
    ],
)
def test_output_that_fails_ends_nothing(tmp_path, shell, variables):
    done = tmp_path / "done"
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    line = "set -o pipefail; " + shell.format(f"{sys.executable} {script} {done}")
    ended = subprocess.run(["bash", "-c", line], env={**os.environ, **variables}, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.strip()) in ((0, ""), (0, "an error"))
    assert done.read_text() == "went on"


# Filters standard error, as a run does around steps; writes past sys.stderr, as compiled libraries do.
FILTERED = """
import os, sys
from pathlib import Path
from hpc_oialr.streams import without_lines
with without_lines([b"chatter"]):
    try:
        os.write(2, b"chatter 1\\nan error\\nchatter 2\\n")
    except OSError:
        pass  # closed
Path(sys.argv[1]).write_text("went on")
"""


@pytest.mark.parametrize("redirected", ["", "2> /dev/full", "2>&-", "2> >(exit)"])
def test_a_filtered_standard_error_that_fails_ends_nothing(tmp_path, redirected):
    done = tmp_path / "done"
    script = tmp_path / "program.py"
    script.write_text(FILTERED)
    ended = subprocess.run(
        ["bash", "-c", f"{sys.executable} {script} {done} {redirected}"], capture_output=True, text=True
    )
    assert ended.returncode == 0
    assert done.read_text() == "went on"
    assert ended.stderr == ("" if redirected else "an error\n")
