"""A whole run under mpirun: metrics over MPI, the same record as over gloo, and a clean end of MPI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.crowd import Crowd, oialr
from support.mpirun import mpirun, needs_mpirun
from support.tiny_runs import write_recipe
from support.train_workers import losses

from hpc_oialr.record import read_metrics


def updates(folder: Path) -> list[dict[str, Any]]:
    rows = read_metrics(folder / "updates.jsonl")
    return [{key: value for key, value in row.items() if key not in ("update_s", "svd_s")} for row in rows]


def channel(folder: Path) -> str:
    log = (folder / "logs" / "process_0.log").read_text()
    return log.partition("metrics go over ")[2].split()[0]


@needs_mpirun
def test_over_mpi_and_over_gloo(tmp_path: Path) -> None:
    recipe = str(write_recipe(tmp_path, train={"steps": 14, "evaluations": 1}))
    over_gloo, over_mpi = tmp_path / "gloo", tmp_path / "mpi"
    with Crowd(oialr, 2, str(tmp_path / "log"), "train", recipe, "--out", str(over_gloo)) as crowd:
        assert [crowd.end(rank)[0] for rank in range(2)] == [0, 0]
    ran = mpirun(2, "-m", "hpc_oialr", "train", recipe, "--out", str(over_mpi))
    assert ran.returncode == 0, ran.stderr
    assert (channel(over_gloo), channel(over_mpi)) == ("gloo", "mpi")
    assert updates(over_mpi) == updates(over_gloo) != []
    assert losses(over_mpi) == losses(over_gloo)
    gloo, mpi = (json.loads((run / "summary.json").read_text()) for run in (over_gloo, over_mpi))
    assert mpi["weights_sha256"] == gloo["weights_sha256"]
