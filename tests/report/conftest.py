from __future__ import annotations

import pytest
from support.made_runs import make_run

from hpc_oialr.report.runs import find_runs


@pytest.fixture
def comparison(tmp_path):
    """The folder of a comparison: a dense run, and one at low rank."""
    make_run(tmp_path / "demo" / "dense", dense=True)
    make_run(tmp_path / "demo" / "oialr")
    return tmp_path / "demo"


@pytest.fixture
def runs(comparison):
    found = find_runs([comparison])
    yield found
    for run in found:
        run.close()


@pytest.fixture
def run(runs):
    return runs[1]
