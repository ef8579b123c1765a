"""A rank that is late is named in the metrics and by ``oialr report``."""

from __future__ import annotations

from statistics import median

import pytest
from support.spawn import spawn
from support.tiny_runs import write_recipe
from support.train_workers import slow_worker, train_worker

from hpc_oialr.cli.main import main
from hpc_oialr.record import read_metrics
from hpc_oialr.report.stragglers import straggler

DELAY_S = 0.3


def test_the_slow_rank_is_named(tmp_path, capsys):
    recipe = write_recipe(tmp_path, train={"steps": 9, "evaluations": 1, "global_batch": 9})
    folder = tmp_path / "run"
    spawn(slow_worker, 3, str(recipe), str(folder), 1, DELAY_S)
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "split" not in row]
    assert [row["slowest_rank"] for row in rows].count(1) > 6
    # Of the forward passes alone: in the backward pass the others wait as well.
    late_s = median(row["slowest_late_s"] for row in rows)
    assert DELAY_S / 2 < late_s < 2 * DELAY_S
    capsys.readouterr()
    assert main(["report", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"run: rank 1 on {rows[0]['slowest_node']} holds the others up: " in said


def test_nothing_is_measured_where_all_ranks_wait_in_the_forward_pass(tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 2, "evaluations": 1}, engine={"class_path": "FSDP"})
    spawn(train_worker, 2, str(recipe), str(tmp_path / "run"))
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert not any("slowest_rank" in row for row in rows)
    assert straggler(rows) is None


@pytest.mark.parametrize(("ratios", "ranks"), [([1.1] * 6, [0] * 6), ([1.5] * 6, [0, 1, 2, 0, 1, 2])])
def test_no_rank_stands_out(ratios, ranks):
    rows = [
        {"step": 1, "slowest_rank": rank, "slowest_node": "n", "slowest_ratio": ratio, "slowest_late_s": 0.1}
        for rank, ratio in zip(ranks, ratios, strict=True)
    ]
    assert straggler(rows).startswith("no rank is late all the time; the slowest one takes 1.")
