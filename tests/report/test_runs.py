from __future__ import annotations

import json

import numpy as np
import pytest
from support.made_runs import NAMES, make_record, make_run
from support.spectra_reports import report, writer_of

from hpc_oialr.errors import DataError
from hpc_oialr.report.runs import (
    conversions,
    dense_of,
    find_runs,
    pareto_front,
    pareto_fronts,
    ratios_to_dense,
    settling_steps,
    share_of_k,
    spread,
    step_seconds,
)


def test_a_comparison_holds_two_runs(runs):
    assert [run.name for run in runs] == ["dense", "oialr"]
    assert [run.dense for run in runs] == [True, False]
    assert dense_of(runs) is runs[0]
    assert runs[0].spectra is None
    assert runs[1].spectra.layers == NAMES


def test_runs_of_one_name_are_called_by_their_parents_too(tmp_path):
    paths = [make_run(tmp_path / parent / "run") for parent in ("a", "b")]
    assert [run.name for run in find_runs(paths)] == ["a/run", "b/run"]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no run; must be the folder of a run, of oialr compare, or"):
        find_runs([tmp_path])


def test_a_record_alone_is_enough(tmp_path):
    make_record(tmp_path / "spectra.h5")
    [run] = find_runs([tmp_path / "spectra.h5"])
    assert run.last_step == 50
    assert (len(run.evaluations), run.summary, run.config) == (0, {}, {})
    run.close()


def test_the_record_of_a_run_that_has_not_ended(tmp_path):
    writer_of(tmp_path / "spectra.h5").write(report(10), wait=True)
    assert not (tmp_path / "spectra.h5").exists(), "it is not joined yet"
    [run] = find_runs([tmp_path])
    assert run.last_step == 10
    run.close()


def test_evaluations_know_the_share_that_was_trained(run):
    assert run.evaluations.name == "test accuracy"
    assert run.evaluations.step.tolist() == [20, 50]
    assert run.evaluations.share.tolist() == [1.0, 0.25]
    assert run.evaluations.value.tolist() == [0.52, 0.55]


def test_a_metric_between_two_evaluations_is_interpolated(run):
    assert run.evaluations.at(19.0) is None
    assert [run.evaluations.at(seconds) for seconds in (20.0, 35.0, 99.0)] == pytest.approx([0.52, 0.535, 0.55])
    assert run.losses.at(5.0) is None


def test_time_of_a_step_is_that_between_two_rows(runs):
    middle, seconds = step_seconds(runs[0])
    assert middle.tolist() == [15, 25, 35, 45]
    assert seconds.tolist() == [2.0] * 4


def test_r_holds_from_one_event_to_the_next(run):
    edges, shares = share_of_k(run.spectra, last_step=60)
    assert edges.tolist() == [0, 10, 20, 30, 40, 50, 60]
    np.testing.assert_array_equal(shares, [[1, 1, 1, 0.75, 0.5, 0.5]] * 3)


def test_r_of_the_last_event_is_seen_though_the_run_ended_with_it(run):
    assert share_of_k(run.spectra, last_step=50)[0].tolist()[-2:] == [50, 52]


def test_indices_are_spread_from_the_first_to_the_last():
    assert spread(100, 4).tolist() == [0, 33, 66, 99]
    assert (spread(3, 40).tolist(), spread(0, 4).tolist()) == ([0, 1, 2], [])


def test_conversions_and_settling(run):
    assert conversions(run.spectra.values()) == [30]
    assert set(settling_steps(run.spectra, 0.95).values()) == {20.0}
    assert list(settling_steps(run.spectra, 0.9715).values()) == [50.0, 50.0, 40.0]
    assert set(settling_steps(run.spectra, 0.995).values()) == {float("inf")}


def test_costs_over_the_dense_runs(runs):
    assert ratios_to_dense(runs) == {
        "oialr": {"training time": 0.5, "time of a step": 0.5, "peak memory": 0.8, "trained parameters": 0.25}
    }


def test_costs_need_a_dense_run_and_an_end(runs, tmp_path):
    with pytest.raises(DataError, match="runs are oialr; one must be dense and one not. Name the folder of oialr"):
        ratios_to_dense(runs[1:])
    going = find_runs([make_run(tmp_path / "going", ended=False)])
    with pytest.raises(DataError, match=r"has no summary.json: the run has not ended. Let it end."):
        ratios_to_dense([runs[0], *going])


def test_what_no_other_run_beats(tmp_path):
    """Any number of runs; energy only where it was measured throughout, and a run without an end is left out."""
    runs, metrics = {"dense": (0.55, 100.0, 2.0), "low": (0.54, 50.0, 1.0), "worse": (0.53, 60.0, 4.0)}, {}
    for name, (metric, wall_s, joules) in runs.items():
        folder = make_run(tmp_path / name, dense=name == "dense")
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps({**summary, "metric": metric, "wall_s": wall_s}))
        metrics[name] = folder / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics[name].read_text().splitlines()]
        rows = [row if "split" in row else {**row, "energy_J": 200 * joules} for row in rows]
        metrics[name].write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_run(tmp_path / "going on", ended=False)
    found = pareto_fronts(find_runs([tmp_path / name for name in (*runs, "going on")]))
    assert found["runs"] == list(runs)
    assert found["prices"]["training time (s)"] == [100.0, 50.0, 60.0]
    assert found["prices"]["energy (kJ)"] == pytest.approx([2.0, 1.0, 4.0])  # five rows of 200 J
    assert {price: [found["runs"][i] for i in front] for price, front in found["fronts"].items()} == {
        "training time (s)": ["low", "dense"],
        "peak memory (GiB)": ["low", "dense"],
        "trained parameters": ["low", "dense"],
        "energy (kJ)": ["low", "dense"],
    }
    metrics["low"].write_text(metrics["low"].read_text().replace('"energy_J"', '"other"'))
    assert "energy (kJ)" not in pareto_fronts(find_runs([tmp_path / name for name in runs]))["prices"]
    assert pareto_fronts(find_runs([tmp_path / "low", tmp_path / "going on"])) == {}


def test_a_front_of_losses_falls():
    assert pareto_front([1, 2, 3, 2], [0.5, 0.4, 0.45, 0.4], higher_is_better=False) == [0, 1]
