"""Every side of the comparison on made-up data, and what the comparison says of rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.rivals.factors import become_factors, spectron
from benchmarks.rivals.jobs import KEY, Job, Setting, best_rates, tuning, work
from benchmarks.rivals.problems import PROBLEMS, Data
from benchmarks.rivals.sides import SIDES
from benchmarks.rivals.summary import devices, seconds, table
from benchmarks.row_file import RowFile
from hpc_oialr import Selection
from hpc_oialr.lowrank import select

TINY = Setting("cpu", None, tiny=True, evaluations=2)
# One of each kind: the controller, two factors with Muon, a projected gradient, an activation between the factors.
ON_CONVOLUTIONS = ("OIALR, published", "Spectron", "GaLore", "CoLA")
# Conv1D; convolutions, Linear and an Autoformer with what differs there.
RUNS = [
    *(("text_gpt", side) for side in SIDES),
    *(pytest.param("fashion_conv", side, marks=[] if side in ON_CONVOLUTIONS else pytest.mark.long) for side in SIDES),
    *(("fashion_vit", side) for side in ("OIALR, bases follow", "CoLA")),
    ("etth1", "truncated, then trained"),
]


@pytest.mark.parametrize(("problem", "side"), RUNS)
def test_every_side_trains(problem: str, side: str) -> None:
    if SIDES[side].missing:
        pytest.skip(SIDES[side].missing)
    row = work(Job("test", problem, side, 1.0, 1.0, 0), TINY, math.inf)
    assert "failed" not in row, row["failed"]
    assert math.isfinite(row["metric"])
    assert [point["step"] for point in row["curve"]] == [4, 8]
    whole = side.startswith("dense") or SIDES[side].package is not None
    assert (row["trained_share"] == 1) == whole
    if not whole and side != "OIALR, published":
        assert row["stored_share"] < 0.75
        # Two factors hold what U and Vh do, less the cores.
        assert row["trained_share"] < 0.7
    assert ("truncated" in row) == side.startswith("dense")
    assert ("after_cut" in row) == ("OIALR" in side or side in ("truncated, then trained", "cores from the start"))


def test_times_of_a_run_are_those_of_its_phases() -> None:
    row = work(Job("time", "text_gpt", "OIALR, bases follow", 1.0, 1.0, 0), TINY, math.inf)
    assert "failed" not in row, row["failed"]
    # Dense to 30 %, cores to the cut at half, cores, and from 70 % on the bases.
    # The steps with hooks, one before the conversion and one before the cut, are not among them.
    assert [phase["steps"] for phase in row["phases"]] == [1, 1, 2, 2]
    mean = sum(phase["share"] * phase["step_ms"] for phase in row["phases"]) / 1000
    assert seconds(row, 1000) == pytest.approx(1000 * mean + row["events_s"])
    assert row["peak_memory_mib"] > 0


def test_a_cut_keeps_the_leading_singular_values() -> None:
    data = Data(PROBLEMS["fashion_conv"], None, "made-up data", torch.device("cpu"))
    dense, cut = data.model(0), data.model(0)
    become_factors(cut, Selection(), lambda k: k // 4)
    weights = {target.name: target.weight for target in select(dense)}
    for name, layer in ((name, cut.get_submodule(name)) for name in weights):
        exact, got = weights[name].detach().flatten(1), layer.weight.detach().flatten(1)
        s = torch.linalg.svdvals(exact)[min(exact.shape) // 4 :]
        assert torch.linalg.norm(exact - got) == pytest.approx(float(s.norm()), rel=1e-4)


def test_spectron_changes_the_product_by_no_more_than_muon_would() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(48, 96), torch.nn.Linear(96, 2))
    (layer,) = become_factors(model, Selection(), lambda k: k // 4)
    with torch.no_grad():
        layer.up *= 5.0
    lr = 0.1
    optimizer = spectron(model, [layer], lr=lr, adamw_lr=1e-3, weight_decay=0.0)
    changes = []
    for _ in range(6):
        before = layer.weight.detach().clone()
        model(torch.randn(32, 48)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        changes.append(float(torch.linalg.matrix_norm(layer.weight.detach() - before, 2)))
    # Newton-Schulz leaves singular values up to 1.2; the factor's extra is its shape.
    assert max(changes[1:]) < 1.25 * lr * 2**0.5
    assert min(changes) > 0.05 * lr


def row(mode: str, side: str, **more: Any) -> dict[str, Any]:
    found = {"mode": mode, "problem": "text_gpt", "side": side, "rate": 1.0, "budget": 1.0, "seed": 0, "steps": 400}
    shares = {"trained_share": 1.0, "stored_share": 1.0, "peak_memory_mib": None}
    return {**found, **shares, "judged_on": "test", "device": "cpu", **more}


def test_the_best_rate_and_the_pareto_front() -> None:
    tuned = [row("tune", "OIALR", rate=rate, metric=loss) for rate, loss in ((0.5, 2.0), (1.0, 1.5), (2.0, 1.7))]
    assert best_rates(tuned) == {("text_gpt", "OIALR"): 1.0}
    tests = [
        row("test", "dense, Muon", metric=1.4, cpu_s=10.0),
        row("test", "OIALR", metric=1.5, cpu_s=6.0),
        row("test", "GaLore", metric=1.5, cpu_s=7.0),
        row("test", "CoLA", metric=1.6, cpu_s=5.0),
        row("test", "CoLA", metric=1.45, cpu_s=11.0, budget=2.0),
        row("test", "APOLLO", failed="diverged"),
    ]
    assert front(tests, "cpu") == {("dense, Muon", 1.0), ("OIALR", 1.0), ("CoLA", 1.0)}


def front(rows: list[dict[str, Any]], device: str) -> set[tuple[str, float]]:
    points = [(line["side"], p) for line in table(rows, "text_gpt") for p in line["points"].values()]
    return {(side, p["budget"]) for side, p in points if p["front"].get(device)}


def test_what_a_gpu_trained_is_timed_on_both() -> None:
    """400 steps: of 10 ms and one event of 1 s, or of 50 ms."""

    def timed(side: str, device: str, step_ms: float, events_s: float) -> dict[str, Any]:
        phases = [{"steps": 8, "share": 0.25, "step_ms": 2 * step_ms}, {"steps": 24, "share": 0.75, "step_ms": step_ms}]
        return row("time", side, device=device, metric=None, phases=phases, events_s=events_s)

    rows = [
        row("test", "dense, Muon", device="cuda", metric=1.4, train_s=99.0, cpu_s=99.0),
        row("test", "OIALR", device="cuda", metric=1.5, train_s=99.0, cpu_s=99.0),
    ]
    assert devices(rows, "text_gpt") == []
    rows += [timed("dense, Muon", "cuda", 8.0, 0.0), timed("OIALR", "cuda", 8.0, 1.0), timed("OIALR", "cpu", 40.0, 0.0)]
    lines = {line["side"]: line["points"] for line in table(rows, "text_gpt")}
    assert lines["OIALR"][1.0]["seconds"] == pytest.approx({"cuda": 5.0, "cpu": 20.0})
    assert devices(rows, "text_gpt") == ["cuda", "cpu"]
    assert front(rows, "cuda") == {("dense, Muon", 1.0)}
    assert front(rows, "cpu") == {("OIALR", 1.0)}


def test_the_file_knows_what_was_run(tmp_path: Path) -> None:
    file, jobs = RowFile(tmp_path / "rows.json", KEY), tuning(["text_gpt"], ["OIALR", "CoLA"])
    assert [(job.side, job.rate) for job in jobs[:3]] == [("OIALR", 2.0), ("CoLA", 2.0), ("OIALR", 1.0)]
    left = work(jobs[0], TINY, 0.0)
    assert left["left_out"] == "the time was over"
    file.add({**TINY.head(jobs[1]), "metric": 1.0})
    assert file.key(TINY.head(jobs[1])) in {file.key(row) for row in file.rows()}
    assert file.key(left) not in {file.key(row) for row in file.rows()}
