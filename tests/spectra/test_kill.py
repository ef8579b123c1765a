"""Kill -9 at random moments: ``benchmarks/kill_spectra.py`` with a few of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support.mpirun import HERE, python_environment

SCRIPT = """
import sys
from pathlib import Path
from benchmarks.kill_spectra import moments
met = []
for row in moments(Path(sys.argv[1]), 40, seed=3):
    assert row["nothing_lost"] and row["equal"] and row["one_file"], row
    met.append(row["confirmed"])
    print(row["confirmed"])
    # On a busy machine many kills come before the first update or after the last one.
    if len(met) >= 8 and len(set(met)) > 2:
        break
"""


def test_kill_at_any_moment_loses_nothing_that_was_confirmed(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(
        command, env=python_environment(), cwd=HERE, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    confirmed = [int(line) for line in done.stdout.split()]
    assert len(confirmed) >= 8
    assert len(set(confirmed)) > 2, "all kills met the same moment"
