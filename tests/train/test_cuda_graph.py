from __future__ import annotations

import gc
import json
import types
import weakref
from dataclasses import replace

import pytest
import torch
from support.replays import allow_on_cpu, record
from support.tiny_runs import write_recipe
from support.train_workers import stop_at_step
from torch import nn

from hpc_oialr.distributed import World
from hpc_oialr.errors import ConfigError
from hpc_oialr.record import read_metrics
from hpc_oialr.train import cuda_graph
from hpc_oialr.train.checkpoint import load_optimizer, optimizer_state
from hpc_oialr.train.cuda_graph import WARM_UP, CaptureError, GraphedStep, cause, refusal
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train
from hpc_oialr.train.run_context import make_run_context
from hpc_oialr.train.tasks import Classification, Forecasting, LanguageModelling

WORLD = World.single("cpu")
CPU = torch.device("cpu")


def fails(call, device):
    raise CaptureError("operation not permitted when stream is capturing")


def losses(result):
    return [row["loss"] for row in read_metrics(result.folder / "metrics.jsonl") if "metric" not in row]


# -- whole runs ----------------------------------------------------------------------------------


# Captures of 24 steps: dense, after the conversion at step 6, and after updates at steps 12 and 18 or in another phase.
@pytest.mark.parametrize(
    ("optimizer", "method", "captures"),
    [
        ("MuonAdamW", {"frequency": 6}, 4),
        pytest.param("AdamW", {"frequency": 6}, 4, marks=pytest.mark.long),
        pytest.param(
            "MuonAdamW",
            {"frequency": 9, "importance": "inputs and gradients", "moments_steps": 2},
            3,
            marks=pytest.mark.long,
        ),
        ("AdamW", {"frequency": 30, "bases_trained": [[11, 17]]}, 4),
    ],
    ids=["Muon", "AdamW", "moments", "phases"],
)
def test_a_run_of_replays_is_that_of_eager_steps(tmp_path, monkeypatch, optimizer, method, captures):
    """Through a conversion and cuts, with dropout, in two parts and clipped; stopped and resumed in between."""
    over = {"optimizer": {"class_path": optimizer, "init_args": {"lr": 0.01}}}
    over |= {"oialr": {"importance": "weights"} | method, "train": {"accumulation": 2, "gradient_clip": 0.5}}
    recipe = load_config(write_recipe(tmp_path, **over))
    plain = train(recipe, tmp_path / "plain", world=WORLD)
    assert plain.summary["cuda_graph"] == "off: it needs a GPU"
    # The rates are fp32 tensors here, numbers in the plain run.
    allow_on_cpu(monkeypatch, fails)
    eager = train(recipe, tmp_path / "eager", world=WORLD)
    assert eager.summary["cuda_graph"].startswith("off: it cannot be captured (operation not permitted")
    assert losses(eager) == pytest.approx(losses(plain), rel=1e-4)
    made = []

    def counted(call, device):
        made.append(record(call, device))
        return made[-1]

    allow_on_cpu(monkeypatch, counted)
    graphed = train(recipe, tmp_path / "graphed", world=WORLD)
    assert graphed.summary["cuda_graph"] == "on"
    assert len(made) == captures
    train(recipe, tmp_path / "halves", world=WORLD, stop=stop_at_step(10))
    halves = resume(tmp_path / "halves", world=WORLD)
    for run in (graphed, halves):
        assert losses(run) == losses(eager)
        for name in ("weights_sha256", "r", "metric"):
            assert run.summary[name] == eager.summary[name]


def test_a_refusal_is_logged_once_and_an_error_where_graphs_are_asked_for(tmp_path, caplog):
    caplog.set_level("INFO")
    recipe = write_recipe(tmp_path, train={"steps": 3})
    summary = train(load_config(recipe), tmp_path / "run", world=WORLD).summary
    assert summary["cuda_graph"] == "off: it needs a GPU"
    assert [m for m in caplog.messages if "CUDA graph" in m] == ["no CUDA graph of the steps: it needs a GPU"]
    with pytest.raises(ConfigError, match="train.cuda_graph is 'on'; cannot be had here: it needs a GPU"):
        train(load_config(recipe, ["--train.cuda_graph", "on"]), tmp_path / "on", world=WORLD)
    assert not (tmp_path / "on").exists()
    # YAML reads the word as true.
    written = write_recipe(tmp_path / "yaml", train={"cuda_graph": True})
    assert load_config(written).config.train.cuda_graph == "on"


def test_it_may_change_when_a_run_is_resumed(tmp_path):
    train(load_config(write_recipe(tmp_path)), tmp_path / "run", world=WORLD, stop=stop_at_step(3))
    result = resume(tmp_path / "run", settings=["--train.cuda_graph", "off"], world=WORLD)
    assert json.loads((result.folder / "summary.json").read_text())["cuda_graph"] == "off: train.cuda_graph is off"


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu():
    """Its rates are tensors there, and its optimizer computes as a GPU does."""
    module = nn.Linear(2, 2)
    there = torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.3), fused=True, capturable=True)
    here = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    tensors, rest = optimizer_state(module, there)
    load_optimizer(module, here, tensors, json.loads(json.dumps(rest)))
    (group,) = here.param_groups
    assert (group["lr"], group["fused"], group["capturable"]) == (0.1, None, False)
    assert group["weight_decay"] == there.param_groups[0]["weight_decay"]
    module(torch.ones(2)).sum().backward()
    here.step()


# -- reasons -------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(tmp_path):
    """A context that says it is on a GPU, with an optimizer that can be captured."""
    context = make_run_context(
        load_config(write_recipe(tmp_path, oialr={"frequency": 20, "importance": "weights"})).config, WORLD
    )
    return replace(context, world=types.SimpleNamespace(device=torch.device("cuda", 0)))


def test_what_is_captured_and_what_not(on_gpu):
    def reason(**changes):
        return refusal(replace(on_gpu, **changes))

    def configured(**changes):
        return reason(config=replace(on_gpu.config, **changes))

    p = nn.Parameter(torch.zeros(2, 2))
    assert reason() == ""
    assert "one process" in reason(controller=types.SimpleNamespace(engine=object()))
    assert "loss scale of fp16" in reason(scaler=torch.amp.GradScaler("cpu"))
    assert configured(task=Classification(mixup=0.2)) == "Classification draws random numbers on the host"
    assert configured(task=Classification(cutmix=1.0)) != ""
    for task in (Classification(label_smoothing=0.1), LanguageModelling(), Forecasting()):
        assert configured(task=task) == ""
    assert reason(optimizer=torch.optim.AdamW([p], capturable=False)) == "AdamW computes on the host"
    assert reason(optimizer=torch.optim.AdamW([p], capturable=True)) == ""
    assert reason(optimizer=torch.optim.SGD([p])) == "SGD computes on the host"
    assert reason(optimizer=torch.optim.SGD([p], fused=True)) == ""
    method = replace(on_gpu.config.oialr, frequency=19)
    assert "r changes every 19 steps" in configured(oialr=method)
    watched = replace(method, frequency=20, importance="inputs", moments_steps=20)
    assert "of which the last 1 run hooks" in configured(oialr=watched)
    assert configured(oialr=replace(watched, frequency=21)) == ""
    assert configured(oialr=None) == ""
    assert configured(compile="blocks") == ""
    assert configured(oialr=method, train=replace(on_gpu.config.train, cuda_graph="on")) == ""
    assert configured(train=replace(on_gpu.config.train, cuda_graph="off")) == "train.cuda_graph is off"
    torch.use_deterministic_algorithms(True)
    try:
        assert reason() == "deterministic algorithms are asked for"
    finally:
        torch.use_deterministic_algorithms(False)


# -- when it is captured -------------------------------------------------------------------------


class Steps:
    """A step on one weight, which counts how it is called."""

    def __init__(self, monkeypatch, capture=record):
        self.module = nn.Linear(2, 1, bias=False)
        self.called = self.captured = 0

        def counted(call, device):
            self.captured += 1
            return capture(call, device)

        monkeypatch.setattr(cuda_graph, "capture", counted)
        self.graphed = GraphedStep(self.step, self.module, CPU)

    def step(self, batch):
        self.called += 1
        loss = self.module(batch["x"]).square().mean()
        loss.backward()
        with torch.no_grad():
            for p in self.module.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
        self.module.zero_grad()
        return loss.detach()


def batches(count, size=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(size)
    return [{"x": torch.randn(size, 2, generator=generator, dtype=dtype)} for _ in range(count)]


def test_captured_after_eager_steps_and_again_after_every_change(monkeypatch):
    steps = Steps(monkeypatch)
    for batch in batches(WARM_UP):
        steps.graphed(batch)
    assert steps.captured == 0
    assert steps.graphed.status == "off: too few steps with the same shapes"
    seen = [steps.graphed(batch) for batch in batches(3)]
    assert steps.captured == 1
    assert len({float(loss) for loss in seen}) == 3, "every loss is its own tensor"
    for change in (
        steps.graphed.forget,
        lambda: steps.module.register_parameter("more", nn.Parameter(torch.zeros(1))),
        lambda: steps.module.more.requires_grad_(False),
    ):
        before = steps.captured
        change()
        for batch in batches(WARM_UP):
            steps.graphed(batch)
        assert steps.captured == before
        for batch in batches(2):
            steps.graphed(batch)
        assert steps.captured == before + 1
    # Another batch shape has eager steps of its own.
    for batch in batches(WARM_UP, size=5):
        steps.graphed(batch)
    assert steps.captured == 4
    steps.graphed(batches(1, size=5)[0])
    assert steps.captured == 5
    assert steps.graphed.status == "on"


def test_nothing_is_lost_where_a_step_cannot_be_captured(monkeypatch, caplog):
    def fails_after_backward(call, device):
        # Gradients have been made, of which a capture computes no values.
        steps.module.weight.grad = torch.full_like(steps.module.weight, float("nan"))
        raise CaptureError("the host waits for a value")

    torch.manual_seed(0)
    steps = Steps(monkeypatch, fails_after_backward)
    torch.manual_seed(0)
    plain = nn.Linear(2, 1, bias=False)
    data = batches(WARM_UP + 3)
    found = [float(steps.graphed(batch)) for batch in data]
    steps.module, weight = plain, steps.module.weight
    assert found == [float(steps.step(batch)) for batch in data]
    assert torch.equal(weight, plain.weight)
    assert steps.captured == 1
    reason = "it cannot be captured (the host waits for a value)"
    assert caplog.messages == [f"no CUDA graph of the steps from now on: {reason}"]
    assert steps.graphed.status == f"off: {reason}"


def test_the_reason_names_the_line_outside_of_torch():
    with pytest.raises(RuntimeError) as caught:
        nn.Linear(2, 3)(torch.ones(4))
    line = caught.tb.tb_lineno
    assert cause(caught.value).endswith(f"; test_cuda_graph.py:{line}: nn.Linear(2, 3)(torch.ones(4))")
    assert cause(RuntimeError("never raised")) == "never raised"


def test_a_parameter_that_is_replaced_is_freed(monkeypatch):
    steps = Steps(monkeypatch)
    for batch in batches(WARM_UP + 2):
        steps.graphed(batch)
    old = weakref.ref(steps.module.weight)
    steps.module.weight = nn.Parameter(torch.zeros(1, 2))
    gc.collect()
    assert old() is None
