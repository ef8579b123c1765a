"""``python -m benchmarks.gpu`` in its tiny size on the CPU, and what it does when something goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import counts, layer, layer_variants, marked_tests, timing
from benchmarks.gpu.__main__ import chosen, main
from benchmarks.gpu.execution import MODES
from benchmarks.gpu.results import Results, load
from benchmarks.gpu.runner import Case, Context, NotRunError, Plan, run
from benchmarks.gpu.sections import PLANS
from benchmarks.gpu.step import ORDER
from benchmarks.gpu.svd import METHODS
from benchmarks.gpu.table import lines

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# What GPU machines did not have; a section that imports one of these would be lost there.
ABSENT = (
    "jsonargparse",
    "submitit",
    "deepspeed",
    "matplotlib",
    "plotly",
    "pandas",
    "scipy",
    "hypothesis",
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The whole command, in a process that lacks most packages: its file and what it printed."""
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    hide = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))"
    # Time is generous, since a test must not fail on a busy machine; on an idle one it takes ten seconds.
    start = f"from benchmarks.gpu.__main__ import main; main(['--out', {str(out)!r}, '--budget', '600'])"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", f"{hide}; {start}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def rows_of(tiny, section):
    return load(tiny[0])["sections"][section]["rows"]


def test_every_section_has_rows_and_none_an_error(tiny):
    content = load(tiny[0])
    sections = content["sections"]
    assert list(sections) == [plan.name for plan in PLANS]
    assert {name: section["errors"] for name, section in sections.items() if section["errors"]} == {}
    left_out = {name: section["left out"] for name, section in sections.items() if section["left out"]}
    assert left_out == {"accuracy": ["all: not run: no --data"], **_without_marked_tests()}
    assert all(section["rows"] for name, section in sections.items() if name not in left_out)
    assert (content["card"], content["tiny"]) == ("CPU", True)
    assert content["environment"]["packages"]["torch"] == torch.__version__


def _without_marked_tests():
    return {} if marked_tests.marked_files() else {"pytest": ["pytest -m gpu: no test is marked gpu"]}


def test_the_table_shows_every_section_again(tiny, capsys):
    main(["--table", str(tiny[0])])
    shown = capsys.readouterr().out
    assert shown.strip() in tiny[1]
    for plan in PLANS:
        assert f"\n{plan.name} (" in shown
    assert "tiny: figures mean nothing" in shown
    assert "* eager: a CUDA graph needs a GPU" in shown


def test_every_layer_variant_is_right(tiny):
    rows = rows_of(tiny, "layer")
    assert [row["variant"] for row in rows] == list(layer_variants.VARIANTS)
    for row in rows:
        assert row["right"], row
        assert 1e-4 < row["error"] < layer.WORST_ERROR
        assert row["ms"] > 0
    by_name = {row["variant"]: row for row in rows}
    assert by_name["dense"]["time_ratio"] == 1
    # 48 x 32 at r = 8, 24 tokens: 3 B m n; 2 B r (m + n) + 3 B r^2; with B r^2 + r^2 (m + n).
    assert by_name["factored"]["operation_ratio"] == pytest.approx((30720 + 4608) / 110592)
    assert by_name["folded"]["operation_ratio"] == pytest.approx((30720 + 1536 + 5120) / 110592)


def test_every_model_optimizer_and_mode_is_stepped(tiny):
    rows = rows_of(tiny, "step")
    assert {row["model"] for row in rows} == set(ORDER)
    assert {row["optimizer"] for row in rows} == {"AdamW", "Muon"}
    assert {row["mode"] for row in rows} == set(MODES)
    for row in rows:
        assert row["finite"] is True
        assert row["kernels"] > 100
        assert row["tflop"] > 0
    low = [row for row in rows if row["r_over_k"] is not None]
    assert low
    assert all(0 < row["operation_ratio"] < 1 for row in low)
    assert sum(row.get("repeated", False) for row in rows) == len(low)


def test_an_update_counts_waits_and_keeps_bases_orthonormal(tiny):
    rows = rows_of(tiny, "update")
    events = [(row["event"], row["r_over_k"]) for row in rows if row["model"] == "ViT-B/16"]
    later = [("cut", 0.25), ("update", 0.25), ("cut", 0.125), ("update", 0.125)]
    assert events == [("conversion", 0.5), ("update", 0.5), *later]
    for row in rows:
        assert row["synchronisations"] > 0
        assert row["layers"] > 10
        assert row["seconds"] > 0
    assert max(row["orthogonality_error"] for row in rows) < 1e-5


def test_every_way_to_an_svd_is_judged(tiny):
    rows = {row["way"]: row for row in rows_of(tiny, "svd")}
    assert list(rows) == list(METHODS)
    assert all(row["residual"] < 1e-5 for row in rows.values())
    # Squaring the matrix in float32 loses digits, which the figure must show.
    assert rows["eigh of A^T A, fp32"]["orthogonality"] > 10 * rows["package"]["orthogonality"]


# -- failures and deadlines ------------------------------------------------------------------------


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
    begin = time.monotonic()
    run(plans, Context(CPU, True), Results(out, "CPU", tiny=True), 5)
    assert time.monotonic() - begin < 30
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


# -- the result file -------------------------------------------------------------------------------


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
    with pytest.raises(
        SystemExit, match=r"other.json is no result of python -m benchmarks.gpu: it has no kind"
    ):
        main(["--out", str(other), "--only", "card"])
    assert other.read_text() == '{"rows": []}'
    other.write_text("what")
    with pytest.raises(SystemExit, match=r"no result of python -m benchmarks.gpu: Expecting value"):
        main(["--table", str(other)])
    card = tmp_path / "card.json"
    Results(card, "NVIDIA H100", tiny=False)
    expected = (
        r"holds results of NVIDIA H100 in full size, this run is on CPU in tiny size; choose another --out"
    )
    with pytest.raises(SystemExit, match=expected):
        main(["--out", str(card)])
    with pytest.raises(SystemExit, match=r"--data /nowhere does not exist; give the folder or archive"):
        main(["--data", "/nowhere"])


def test_only_names_sections():
    assert [plan.name for plan in chosen("svd, card")] == ["card", "svd"]
    with pytest.raises(ValueError, match=r"--only cards is no section; there are card, layer, step"):
        chosen("cards")


# -- the instruments -------------------------------------------------------------------------------


def test_a_wrong_kernel_is_flagged_and_one_that_fails_disturbs_nobody(monkeypatch):
    def wrong(x, Vh, S, U, bias):
        return 1.1 * layer_variants.folded(x, Vh, S, U, bias)

    def broken(x, Vh, S, U, bias):
        raise NotImplementedError("r must be a multiple of 16")

    def not_a_number(x, Vh, S, U, bias):
        return layer_variants.folded(x, Vh, S, U, bias) * float("nan")

    costs = (layer_variants.folded_cost, layer_variants._folded_numbers)
    for product in (wrong, broken, not_a_number):
        variant = layer_variants.Variant(layer_variants.function(product), *costs)
        monkeypatch.setitem(layer_variants.VARIANTS, product.__name__, variant)
    rows = {row["variant"]: row for row in layer.measure(layer.Shape(32, 48, 16, 8), Context(CPU, True))}
    assert rows["wrong"]["right"] is False
    assert rows["wrong"]["error"] == pytest.approx(0.1, rel=0.2)
    assert rows["not_a_number"]["right"] is False
    assert rows["broken"]["failed"] == "NotImplementedError: r must be a multiple of 16"
    assert rows["factored"]["right"]
    assert "dense autocast" not in rows  # at k/4 only
    shown = "\n".join(lines({**_empty(), "sections": {"layer": _section(rows.values())}}))
    assert "WRONG" in shown
    assert "failed" in shown


def _empty():
    return Results(None, "CPU", tiny=True).content


def _section(rows):
    return {"seconds": 0, "rows": list(rows), "left out": [], "errors": []}


class FakeCuda(types.SimpleNamespace):
    """The part of ``torch.cuda`` that a capture uses, with a capture that fails as torch 2.11 does."""

    def __init__(self, *, fails):
        super().__init__(fails=fails, streams=[], replays=0, Event=None)

    def Stream(self, device):
        return types.SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self, device):
        return types.SimpleNamespace(wait_stream=lambda other: None, name="the caller's")

    def stream(self, stream):
        return nullcontext()

    def synchronize(self, device=None):
        pass

    def set_stream(self, stream):
        self.streams.append(stream.name)

    def CUDAGraph(self):
        def replay():
            self.replays += 1

        return types.SimpleNamespace(replay=replay)

    def graph(self, graph, pool=None):
        cuda = self

        class Capture:
            def __enter__(self):
                cuda.capturing = True

            def __exit__(self, *_):
                cuda.capturing = False
                if cuda.fails:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        return Capture()


def test_a_call_that_cannot_be_captured_runs_eagerly_and_says_why(monkeypatch):
    cuda = FakeCuda(fails=True)
    monkeypatch.setattr(torch, "cuda", cuda)
    calls = []

    def waits():
        calls.append(getattr(cuda, "capturing", False))
        if calls[-1]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    run_it, method = timing.captured(waits, torch.device("cuda", 0))
    assert run_it is waits
    assert method == "eager: operation not permitted when stream is capturing"
    assert cuda.streams == ["the caller's"]
    assert calls == [False, False, False, True]


def test_a_captured_call_is_replayed(monkeypatch):
    cuda = FakeCuda(fails=False)
    monkeypatch.setattr(torch, "cuda", cuda)
    run_it, method = timing.captured(lambda: None, torch.device("cuda", 0))
    run_it()
    assert (method, cuda.replays) == ("graph", 1)


def test_times_are_of_one_call():
    slow = timing.interleaved(
        {"a": lambda i: time.sleep(0.004), "b": lambda i: None}, CPU, sets=3, seconds=0.1
    )
    assert slow["a"].ms >= 4
    assert slow["a"].ms > slow["b"].ms
    assert slow["a"].method == "eager"


def test_kernels_are_told_from_copies_and_ranges():
    def event(name, device, *, annotation=False):
        return types.SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation)

    cuda, cpu = counts.DeviceType.CUDA, counts.DeviceType.CPU
    assert counts._is_kernel(event("void gemm_kernel", cuda))
    for other in (
        event("aten::mm", cpu),
        event("Memcpy HtoD", cuda),
        event("Memset (Device)", cuda),
        event("Optimizer.step#AdamW.step", cuda),
        event("my range", cuda, annotation=True),
    ):
        assert not counts._is_kernel(other)


def test_waits_are_counted_with_their_places(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with counts.synchronisations(torch.device("cuda", 0)) as waits:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert waits.count == 3
    assert [place.rpartition(":")[0] for place in waits.places] == ["benchmarks/test_gpu.py"]
    assert list(waits.places.values()) == [3]
    assert modes == ["warn", 0]
    with counts.synchronisations(CPU) as waits:
        torch.ones(3).sum().item()
    assert waits.count == 1


def test_marked_tests_are_found_run_and_counted(tmp_path, monkeypatch):
    folder = tmp_path / "tests"
    folder.mkdir()
    (tmp_path / "setup.cfg").write_text("[tool:pytest]\nmarkers =\n    gpu: needs one\n")
    (folder / "test_marked.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "@pytest.mark.parametrize('x', ['a b', 'c'])\n"
        "def test_good(x): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no')\n"
        "def test_skipped(): pass\n"
    )
    (folder / "test_other.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.setattr(marked_tests, "ROOT", tmp_path)
    files = marked_tests.marked_files(tmp_path)
    assert [path.name for path in files] == ["test_marked.py"]
    row = marked_tests.run_pytest(files, 100)
    assert (row["passed"], row["failed"], row["skipped"], row["exit_code"]) == (2, 1, 1, 1)
    assert row["failures"] == ["tests/test_marked.py::test_bad"]
    assert "assert 1 == 2" in row["output"]
    (folder / "test_marked.py").write_text(
        "import time, pytest\n@pytest.mark.gpu\ndef test_long(): time.sleep(60)\n"
    )
    row = marked_tests.run_pytest(files, 1)
    assert row["cut_off"] == "after 1 s"
    assert row["exit_code"] is None


def test_the_result_is_plain_json(tiny):
    text = tiny[0].read_text()
    assert (
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["kind"]
        == "benchmarks.gpu"
    )
