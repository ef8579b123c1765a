"""A search whose trials are jobs of a real Slurm, killed in the middle and continued."""

from __future__ import annotations

import pytest
from support.searches import PATIENCE_S, SPACE, finished, kill_once, search, table_of
from support.tiny_runs import write_recipe

from benchmarks.slurm_cluster import Cluster

pytest.importorskip("submitit", reason="submitit is not installed: pip install 'hpc_oialr[search]'")
pytest.importorskip("optuna", reason="optuna is not installed: pip install 'hpc_oialr[search]'")


@pytest.mark.long
def test_jobs_go_on_while_nobody_watches(cluster: Cluster) -> None:
    root = cluster.root / "searched"
    root.mkdir()
    recipe = write_recipe(root)
    (root / "space.yaml").write_text(SPACE)
    folder = root / "found"
    words = [str(recipe), "--space", "space.yaml", "--trials", "3", "--parallel", "2", "--out", "found", "--no-pruning"]
    kill_once(search(words, cluster.environment, root), lambda: (folder / "trial_0001" / "job.json").exists())
    said, _ = search(words, cluster.environment, root).communicate(timeout=PATIENCE_S)
    assert "trial 0: taken up again" in said
    assert "trial 1: taken up again" in said
    assert [row["state"] for row in table_of(folder)] == ["complete"] * 3, said
    assert len(finished(folder)) == 3
    table = cluster.oialr("jobs", str(folder))
    assert table.count("COMPLETED") == 3
