"""``benchmarks.gpu`` when a section fails, time runs out, or the result file is not its own."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.gpu.__main__ import chosen, main
from benchmarks.gpu.results import Results, load
from benchmarks.gpu.runner import Case, Context, NotRunError, Plan, run
from benchmarks.gpu.table import lines

CPU = torch.device("cpu")


def case(name, rows):
    return Case(name, lambda: iter(rows))


def test_a_failing_section_leaves_the_rest_there(tmp_path):
    out = tmp_path / "gpu.json"

    def breaks_at_once(context):
        raise RuntimeError("no such driver")

    def breaks_later():
        yield {"a": 1}
        assert load(out)["sections"]["second"]["rows"] == [{"a": 1}]  # on disk before the next is begun
        raise ValueError("lost half-way")

    def refuses():
        raise NotRunError("not today")

    plans = [
        Plan("first", 1, breaks_at_once),
        Plan("second", 1, lambda _: [Case("x", breaks_later), Case("y", refuses), case("z", [{"b": 2}])]),
        Plan("third", 1, lambda _: [case("w", [{"c": 3}])]),
    ]
    results = Results(out, "CPU", tiny=True)
    run(plans, Context(CPU, True), results, 60)
    sections = load(out)["sections"]
    assert sections["first"]["rows"] == []
    assert "RuntimeError: no such driver" in sections["first"]["errors"][0]["error"]
    assert sections["second"]["rows"] == [{"a": 1}, {"b": 2}]
    assert sections["second"]["errors"][0]["case"] == "x"
    assert "ValueError: lost half-way" in sections["second"]["errors"][0]["error"]
    assert sections["second"]["left out"] == ["y: not today"]
    assert sections["third"]["rows"] == [{"c": 3}]
    shown = "\n".join(lines(results.content))
    assert "ERROR x: ValueError: lost half-way" in shown
    assert "left out: y: not today" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_deadline_cuts_off_one_section_and_the_rest_is_there(tmp_path):
    def sleeps():
        yield {"before": 1}
        try:
            time.sleep(60)
        except Exception:
            pytest.fail("measured code must not be able to catch the deadline")

    plans = [
        Plan("slow", 1, lambda _: [Case("long", sleeps), case("never", [{"x": 0}])]),
        Plan("quick", 9, lambda _: [case("short", [{"y": 1}])]),
    ]
    out = tmp_path / "gpu.json"
    run(plans, Context(CPU, True), Results(out, "CPU", tiny=True), 5)
    sections = load(out)["sections"]
    assert sections["slow"]["rows"] == [{"before": 1}]
    assert sections["slow"]["left out"][0].startswith("long: stopped after")
    assert sections["slow"]["left out"][1:] == ["never: no time left"]
    assert sections["quick"]["rows"] == [{"y": 1}]


def test_without_time_everything_is_left_out_and_said(tmp_path):
    out = tmp_path / "gpu.json"
    main(["--out", str(out), "--budget", "0"])
    sections = load(out)["sections"]
    assert all(section["rows"] == [] for section in sections.values())
    assert all(entry.endswith(": no time left") for s in sections.values() for entry in s["left out"])
    assert sections["svd"]["left out"][0] == "n = 24, 2 at once, gesvdj: no time left"


def test_unspent_time_goes_to_later_sections():
    shares = {}

    def note(name):
        def cases(context):
            shares[name] = context.left_s
            return []

        return cases

    run(
        [Plan("a", 1, note("a")), Plan("b", 1, note("b"))],
        Context(CPU, True),
        Results(None, "CPU", tiny=True),
        100,
    )
    assert shares["a"] == pytest.approx(50, abs=5)
    assert shares["b"] == pytest.approx(100, abs=5)


def test_a_lost_gpu_ends_the_measuring(monkeypatch):
    def gone(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    results = Results(None, "a card", tiny=True)
    plans = [
        Plan("bad", 1, lambda _: [Case("kernel", gone)]),
        Plan("next", 1, lambda _: [case("c", [{"x": 1}])]),
    ]
    run(plans, Context(torch.device("cuda", 0), True), results, 60)
    assert results.sections["bad"]["errors"][0]["case"] == "kernel"
    lost = "all: the GPU was lost in kernel: CUDA error: an illegal memory access was encountered"
    assert results.sections["next"]["left out"] == [lost]


def test_sections_that_are_not_run_again_are_kept(tmp_path):
    out = tmp_path / "gpu.json"
    one = [Plan("one", 1, lambda _: [case("c", [{"x": 1}])])]
    two = [Plan("two", 1, lambda _: [case("c", [{"y": 2}])])]
    fails = [Plan("one", 1, lambda _: [Case("c", lambda: 1 // 0)])]
    for plans in (one, two, fails):
        run(plans, Context(CPU, True), Results(out, "CPU", tiny=True), 60)
    sections = load(out)["sections"]
    assert sections["one"]["rows"] == [{"x": 1}]
    assert "ZeroDivisionError" in sections["one"]["errors"][0]["error"]
    assert sections["two"]["rows"] == [{"y": 2}]


def test_files_of_something_else_are_refused(tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text('{"rows": []}')
    with pytest.raises(SystemExit, match=r"other.json is no result of python -m benchmarks.gpu: it has no kind"):
        main(["--out", str(other), "--only", "card"])
    assert other.read_text() == '{"rows": []}'
    other.write_text("what")
    with pytest.raises(SystemExit, match=r"no result of python -m benchmarks.gpu: Expecting value"):
        main(["--table", str(other)])
    card = tmp_path / "card.json"
    Results(card, "NVIDIA H100", tiny=False)
    expected = r"holds results of NVIDIA H100 in full size, this run is on CPU in tiny size; choose another --out"
    with pytest.raises(SystemExit, match=expected):
        main(["--out", str(card)])
    with pytest.raises(SystemExit, match=r"--budget is nan; must be a number of seconds, 0 or more"):
        main(["--budget", "nan"])
    with pytest.raises(SystemExit, match=r"--data /nowhere does not exist; give the folder or archive"):
        main(["--data", "/nowhere"])


def test_only_names_sections():
    assert [plan.name for plan in chosen("svd, card")] == ["card", "svd"]
    with pytest.raises(ValueError, match=r"--only cards is no section; there are card, layer, step"):
        chosen("cards")
