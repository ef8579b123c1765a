"""What ``benchmarks.gpu`` measures with: timing, captures, counts, layer variants, models."""

from __future__ import annotations

import time
import types
import warnings
from contextlib import nullcontext

import pytest
import torch

from benchmarks.gpu import accuracy, counts, layer, layer_variants, marked_tests, models, step, timing
from benchmarks.gpu.execution import make_optimizer
from benchmarks.gpu.results import Results, load
from benchmarks.gpu.runner import Context, NotRunError
from benchmarks.gpu.table import lines
from hpc_oialr import low_rank_layers
from hpc_oialr.lowrank import select

CPU = torch.device("cpu")


def test_a_wrong_kernel_is_flagged_and_one_that_fails_disturbs_nobody(monkeypatch, tmp_path):
    def wrong(x, Vh, S, U, bias):
        return 1.1 * layer_variants.three_products(x, Vh, S, U, bias)

    def broken(x, Vh, S, U, bias):
        raise NotImplementedError("r must be a multiple of 16")

    def not_a_number(x, Vh, S, U, bias):
        return layer_variants.three_products(x, Vh, S, U, bias) * float("nan")

    costs = (layer_variants.three_products_cost, layer_variants._three_products_numbers)
    for product in (wrong, broken, not_a_number):
        variant = layer_variants.Variant(layer_variants.function(product), *costs)
        monkeypatch.setitem(layer_variants.VARIANTS, product.__name__, variant)
    rows = {row["variant"]: row for row in layer.measure(layer.Shape(32, 48, 16, 8), Context(CPU, True))}
    assert rows["wrong"]["right"] is False
    assert rows["wrong"]["error"] == pytest.approx(0.1, rel=0.2)
    assert rows["not_a_number"]["right"] is False
    results = Results(tmp_path / "gpu.json", "CPU", tiny=True)
    results.section("layer").add(rows["not_a_number"])
    assert load(tmp_path / "gpu.json")["sections"]["layer"]["rows"][0]["error"] == "nan"
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
        super().__init__(fails=fails, streams=[], replays=0, clock_ms=0.0, states=["capturing"])
        generator = types.SimpleNamespace(clone_state=lambda: "a copy", graphsafe_set_state=self.states.append)
        self.default_generators = (generator,)

    def Stream(self, device):
        return types.SimpleNamespace(wait_stream=lambda other: None)

    def graph_pool_handle(self):
        return "pool"

    def Event(self, *, enable_timing):
        cuda = self

        class Event:
            def record(self):
                self.at = cuda.clock_ms

            def synchronize(self):
                pass

            def elapsed_time(self, later):
                return later.at - self.at

        return Event()

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
            self.clock_ms += 6.0

        return types.SimpleNamespace(replay=replay)

    def graph(self, graph, pool=None, capture_error_mode=None):
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
    cuda, freed = FakeCuda(fails=True), []
    monkeypatch.setattr(torch, "cuda", cuda)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *given: freed.append(given))
    calls = []

    def waits():
        calls.append(getattr(cuda, "capturing", False))
        if calls[-1]:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    run_it, method = timing.captured(waits, torch.device("cuda", 0))
    assert run_it is waits
    said = "operation not permitted when stream is capturing"
    line = waits.__code__.co_firstlineno + 3
    assert method == f'eager: {said}; test_gpu_instruments.py:{line}: raise RuntimeError("{said}\\nmore")'
    assert cuda.streams == ["the caller's"]
    assert cuda.states == ["capturing", "a copy"]
    assert freed == [(0, "pool"), (0, "pool")], "a graph that is not captured does not tell its own"
    assert calls == [False, False, False, True]


def test_a_captured_call_is_replayed(monkeypatch):
    cuda = FakeCuda(fails=False)
    monkeypatch.setattr(torch, "cuda", cuda)
    run_it, method = timing.captured(lambda: None, torch.device("cuda", 0))
    run_it()
    assert (method, cuda.replays) == ("graph", 1)


def test_a_graph_of_several_inputs_gives_the_time_of_one(monkeypatch):
    cuda = FakeCuda(fails=False)
    monkeypatch.setattr(torch, "cuda", cuda)
    seen = []
    times = timing.interleaved({"a": seen.append}, torch.device("cuda", 0), sets=3, seconds=0.1)
    assert times["a"] == timing.Timing(ms=2.0, spread=0.0, method="graph")  # a replay takes 6 ms
    assert seen == [0, 1, 2] * 4  # three times to warm up, once captured


def test_times_are_of_one_call():
    slow = timing.interleaved({"a": lambda i: time.sleep(0.004), "b": lambda i: None}, CPU, sets=3, seconds=0.1)
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
    assert [place.rpartition(":")[0] for place in waits.places] == ["benchmarks/test_gpu_instruments.py"]
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
    (folder / "test_marked.py").write_text("import time, pytest\n@pytest.mark.gpu\ndef test_long(): time.sleep(60)\n")
    row = marked_tests.run_pytest(files, 1)
    assert row["cut_off"] == "after 1 s"
    assert row["exit_code"] is None


def test_a_step_keeps_its_times_when_the_profiler_fails(monkeypatch):
    def refuses(*_):
        raise AssertionError("No activities specified for the profiler")

    monkeypatch.setattr(counts, "kernels", refuses)
    workload = models.workloads(tiny=True)["mini ViT"]
    row = step.measure(step.Setting(workload, "AdamW", "eager", 0.25), Context(CPU, tiny=True))
    assert row["ms"] > 0
    assert (row["kernels"], row["synchronisations"]) == (None, 0)
    shown = "\n".join(lines({**_empty(), "sections": {"step": _section([row])}}))
    assert "not counted: AssertionError: No activities specified for the profiler" in shown


def test_inputs_do_not_fit_the_cache(monkeypatch):
    properties = types.SimpleNamespace(L2_cache_size=2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    cuda = types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: shape)
    assert len(layer.input_sets(layer.Shape(256, 256, 64, 512), cuda)) == 6  # 2 x 256 KiB each
    assert len(layer.input_sets(layer.Shape(2048, 2048, 64, 8192), cuda)) == 2
    assert len(layer.input_sets(layer.Shape(8, 8, 4, 8), cuda)) == 16


def test_the_table_says_what_spoils_a_step(tiny_step_row):
    shown = "\n".join(lines({**_empty(), "sections": {"step": _section([tiny_step_row])}}))
    assert "NOT ALONE: up to 2.5 GiB were held" in shown
    assert "NOT FINITE: ViT-B/16, AdamW, r/k 0.25" in shown
    assert "* eager: no capture" in shown


@pytest.fixture
def tiny_step_row():
    figures = dict.fromkeys(("ms", "samples_per_s", "mfu", "peak_gib"), 1.0)
    names = {"model": "ViT-B/16", "optimizer": "AdamW", "mode": "cuda graph", "method": "eager: no capture"}
    return names | figures | {"r_over_k": 0.25, "repeated": False, "held_before_gib": 2.5, "finite": False}


def test_the_models_have_their_size():
    """ViT-B/16, the recipe's mini ViT, GPT-2 124M, a Llama-like one of 350M; weights on no device."""
    found = {}
    for name, workload in models.workloads(tiny=False).items():
        with torch.device("meta"):
            model = workload.build()
        numbers = sum(p.numel() for p in model.parameters())
        layers = len(select(model, workload.selection))
        found[name] = (round(numbers / 1e6, 1), layers, workload.samples, workload.tokens)
    assert found == {
        "ViT-B/16": (86.6, 72, 256, 256 * 197),
        "mini ViT": (42.7, 37, 1024, 1024 * 17),
        "GPT-2 124M": (124.4, 48, 16, 16 * 1024),
        "Llama-like 350M": (352.4, 56, 8, 8 * 2048),
    }


@pytest.mark.parametrize("name", ["GPT-2 124M", "Llama-like 350M"])
def test_language_models_attend_causally_without_waiting(name):
    workload = models.workloads(tiny=True)[name]
    model, batch = models.on_device(workload, CPU), models.batch_on(workload, CPU)
    with counts.synchronisations(CPU) as waits:
        loss = model(**batch).loss
    model.set_attn_implementation("sdpa")
    assert waits.count == 0
    assert torch.equal(loss, model(**batch).loss)


def test_accuracy_in_full_size_needs_images():
    (only,) = accuracy.cases(Context(CPU, tiny=False))
    with pytest.raises(NotRunError, match="not run: no --data"):
        only.measure()


def test_random_factors_are_nearly_orthonormal_and_in_the_optimizer():
    workload = models.workloads(tiny=True)["GPT-2 124M"]
    model = models.on_device(workload, CPU)
    optimizer = make_optimizer("Muon", model, workload.selection)
    oialr = models.to_low_rank(model, optimizer, 0.25, workload.selection)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers = low_rank_layers(model)
    assert set(oialr.r.values()) == {8}
    assert list(layers) == oialr.layers
    for layer_ in layers.values():
        assert id(layer_.S) in held
        assert layer_.U.norm(dim=0).mean() == pytest.approx(1, abs=0.2)
        assert layer_.Vh.norm(dim=1).mean() == pytest.approx(1, abs=0.2)
