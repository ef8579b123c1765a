"""Bases chosen by what layers do: which passes count, the same on every engine, after a resume and in copies."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.small_training import batch, on_shards, settings, small_model, train
from support.spawn import spawn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits, merge, muon_adamw
from hpc_oialr.distributed import World
from hpc_oialr.engines import FSDPEngine
from hpc_oialr.errors import ConfigError, UnknownNameError
from hpc_oialr.linalg.weighted_svd import weighted_svd
from hpc_oialr.lowrank.attachment import LayerHook
from hpc_oialr.torch_compat import is_compiled

BOTH = "inputs and gradients"
LIMITS = RankLimits(at_conversion=0.5, max_drop=0.2, round_to=1)
RULE = FixedFraction(0.25)


def controller(model: nn.Module, **options: Any) -> OIALR:
    defaults: dict[str, Any] = {"importance": "inputs", "moments_steps": 3, "limits": LIMITS, "rule": RULE}
    return OIALR(model, muon_adamw(model, lr=0.01), settings(**{**defaults, **options}))


def hooks(model: nn.Module) -> int:
    registries = [(m._forward_pre_hooks, m._forward_hooks) for m in model.modules()]
    return sum(isinstance(h, LayerHook) for pair in registries for each in pair for h in each.values())


class Attention(nn.Module):
    """Self-attention with packed projections."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)), (12,), "0"),
    "attention": (Attention, (5, 12), "attention.in_proj"),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(12, 4, 1)),
        (8, 6, 6),
        "0",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_conversion_is_the_best_for_the_inputs_of_the_last_steps(kind: str) -> None:
    build, shape, name = MODELS[kind]
    torch.manual_seed(0)
    model = build()
    images = kind in ("convolution", "patches")
    scale = torch.logspace(0, -2, 8)[:, None, None] if images else torch.logspace(0, -2, 12)
    inputs = [torch.randn(16, *shape) * scale for _ in range(4)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    oialr = OIALR(model, optimizer, settings(importance="inputs", moments_steps=3, limits=LIMITS))
    target = next(target for target in oialr.targets if target.name == name)
    W = target.weight.detach().reshape(target.shape).double()
    for x in inputs:
        oialr.model(x).square().mean().backward()
        oialr.step()
    counted = torch.cat(inputs[1:])  # the last three steps before the fourth, which converts
    if kind == "patches":
        counted = nn.functional.unfold(counted, 2, stride=2)
    x = (counted.movedim(1, -1) if images else counted).flatten(0, -2).double()
    moments = x.mT @ x
    if kind == "convolution":
        moments = torch.kron(moments, torch.eye(9, dtype=torch.float64))
    assert target.low_rank is not None
    r = target.low_rank.r
    expected, _ = weighted_svd(W, r, None, moments)
    torch.testing.assert_close(
        target.low_rank.merged_weight().reshape(target.shape).double(),
        expected.U @ torch.diag(expected.s) @ expected.Vh,
        rtol=2e-3,
        atol=2e-3,
    )


@pytest.mark.parametrize("moments", ["full", "diagonal"])
@pytest.mark.parametrize("bases", ["inputs", BOTH])
def test_outputs_change_less_than_by_weights(bases: str, moments: str) -> None:
    def change(bases: str) -> float:
        model = small_model()
        oialr = controller(model, importance=bases, moments=moments, frequency=4)
        changes = []
        for t in range(12):
            x, y = batch(t)
            x = x * torch.logspace(0, -2, 12)
            loss = cross_entropy(oialr.model(x), y)
            loss.backward()
            oialr.optimizer.step()
            oialr.optimizer.zero_grad()
            with torch.no_grad():
                before = model(x)
                report = oialr.step()
                if report is not None:
                    assert all((layer.cut_share is not None) == (bases != "weights") for layer in report.layers)
                    changes.append(float((model(x) - before).square().mean()))
        assert len(changes) == 3
        return sum(changes)

    assert change(bases) < 0.5 * change("weights")


def test_evaluations_are_not_counted_and_hooks_go() -> None:
    def run(evaluate: bool) -> tuple[nn.Module, list[int]]:
        model = small_model()
        oialr, seen = controller(model, importance=BOTH), []
        for _ in range(8):
            if evaluate:
                model.eval()
                model(torch.full((3, 12), 100.0)).sum().backward()
                model.train()
                with torch.no_grad():
                    model(torch.full((3, 12), 100.0))
            train(oialr, oialr.optimizer, 1)
            model(batch(0)[0])
            seen.append(hooks(model))
        oialr.detach()
        assert hooks(model) == 0
        return model, seen

    (alone, seen), (evaluated, _) = run(False), run(True)
    # Two hooks on each of the layers that the next change may cut, for three steps before the conversion (4), for one
    # before the update (7).
    assert seen == [4, 4, 4, 0, 0, 4, 0, 0]
    for p, q in zip(alone.parameters(), evaluated.parameters(), strict=True):
        assert torch.equal(p, q)


def test_nothing_is_registered_by_weights_or_between_windows() -> None:
    model = small_model()
    oialr = controller(model, moments_steps=1)
    counts = []
    for _ in range(8):
        train(oialr, oialr.optimizer, 1)
        model(batch(0)[0])
        counts.append(hooks(model) > 0)
    # Only before the conversion (4) and the update (7).
    assert counts == [False, False, True, False, False, True, False, False]
    model = small_model()
    oialr = controller(model, importance="weights")
    train(oialr, oialr.optimizer, 3)
    assert hooks(model) == 0


@pytest.mark.parametrize("at", [2, 3, 5, 6])
def test_resumes_bitwise_within_a_window(at: int) -> None:
    options = {"importance": BOTH, "frequency": 4}
    model = small_model()
    oialr = controller(model, **options)
    train(oialr, oialr.optimizer, at)
    buffer = io.BytesIO()
    state = oialr.state_dict(), oialr.tensor_state(), model.state_dict(), oialr.optimizer.state_dict()
    torch.save(state, buffer)
    buffer.seek(0)
    losses = train(oialr, oialr.optimizer, 8)

    counters, tensors, values, moments = torch.load(buffer)
    again = small_model(seed=1)
    resumed = controller(again, **options)
    resumed.load_state_dict(counters, tensors)
    again.load_state_dict(values)
    resumed.optimizer.load_state_dict(moments)
    assert train(resumed, resumed.optimizer, 8) == losses
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_on_alone(copied: Callable[[Any], Any]) -> None:
    model = small_model()
    oialr = controller(model, importance=BOTH)
    train(oialr, oialr.optimizer, 2)
    twin = copied(oialr)
    frozen = copy.deepcopy(model)
    before = [part.clone() for part in oialr.tensor_state().values()]
    frozen(batch(0)[0]).sum().backward()
    train(twin, twin.optimizer, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, oialr.tensor_state().values(), strict=True))
    assert hooks(merge(model)) == 0
    assert train(twin, twin.optimizer, 8) == train(oialr, oialr.optimizer, 9)[1:]


class Own(nn.Module):
    """A module that torch compiles as a whole, unlike its own containers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = small_model()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("part", ["a layer", "the model", "a wrapper", "a layer in the middle of a window"])
def test_compiled_code_runs_eagerly_while_hooks_gather(part: str) -> None:
    """The same sums and r as without compilation; in all other steps compiled code is what runs."""
    passes = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            passes.append(oialr.t)
            return graph(*inputs)

        return run

    model, other = Own(), Own()  # another model of the process stays compiled
    wrapped = torch.compile(model, backend=backend) if part == "a wrapper" else model
    oialr, plain = controller(wrapped, moments_steps=2), controller(Own(), moments_steps=2)
    other.compile(backend=backend)
    x = batch(0)[0]
    for t in range(8):
        if part != "a wrapper" and t == (2 if "middle" in part else 0):
            (model if part == "the model" else model.layers[0]).compile(backend=backend)
        before = len(passes)
        other(x)
        assert len(passes) == before + 1
        passes.pop()
        assert train(oialr, oialr.optimizer, 1) == pytest.approx(train(plain, plain.optimizer, 1), rel=1e-6)
        expected = plain.tensor_state()
        found = {name.removeprefix("_orig_mod."): tensor for name, tensor in oialr.tensor_state().items()}
        torch.testing.assert_close(found, expected)
        assert any("moments" in name for name in expected) == bool(oialr.gathered)
    assert list(oialr.r.values()) == list(plain.r.values()) != []
    # Neither in the two steps before the conversion nor in the one before the update; torch does not compile a dense
    # layer of its own by itself.
    assert set(passes) == {4, 5, 7} | ({0, 1} if part in ("the model", "a wrapper") else set())


@pytest.mark.parametrize("how", ["detached", "dropped"])
def test_compiled_code_is_put_back_when_a_controller_ends_in_a_window(how: str) -> None:
    model = small_model()
    model[0].compile(backend="eager")
    compiled = model[0]._compiled_call_impl
    oialr = controller(model, moments_steps=4)
    assert oialr.gathered
    assert model[0]._compiled_call_impl is None
    assert is_compiled(model[0]), "others see no difference"
    if how == "detached":
        oialr.detach()
    else:
        del oialr
        gc.collect()
    assert model[0]._compiled_call_impl is compiled


@pytest.mark.parametrize(("width", "tokens", "counted"), [(12, 2000, 1024), (300, 2000, 1200), (300, 700, 700)])
def test_of_a_pass_at_most_four_tokens_a_feature_are_counted(width: int, tokens: int, counted: int) -> None:
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 4))
    oialr = controller(model, moments_steps=4)
    oialr.model(torch.ones(tokens // 100, 100, width))
    # Each token is a row of ones.
    (sums,) = oialr.gathered
    assert torch.equal(sums, torch.full((width * width,), float(counted)))


def test_a_conversion_after_the_first_step_sees_its_inputs() -> None:
    """With a delay of 0 the only step that can gather is the first."""
    model, (x, y) = small_model(), batch(0)
    W = model[0].weight.detach().clone()
    config = settings(importance="inputs", limits=LIMITS, delay=0)
    oialr = OIALR(model, torch.optim.SGD(model.parameters(), lr=0.0), config)
    cross_entropy(oialr.model(x), y).backward()
    report = oialr.step()
    assert report is not None
    assert {layer.name: layer.cut_share is not None for layer in report.layers} == {"0": True, "2": True}
    expected, lost = weighted_svd(W, oialr.r["0"], None, x.mT @ x)
    torch.testing.assert_close(model[0].merged_weight(), expected.U @ torch.diag(expected.s) @ expected.Vh)
    assert report.layers[0].cut_share == pytest.approx(float(lost), rel=1e-3)


def test_a_resume_without_the_moments_warns(caplog: pytest.LogCaptureFixture) -> None:
    def resumed(at: int, *, stored: bool) -> bool:
        model = small_model()
        oialr = controller(model)
        train(oialr, oialr.optimizer, at)
        caplog.clear()
        again = controller(small_model(seed=1))
        again.load_state_dict(oialr.state_dict(), oialr.tensor_state() if stored else None)
        return any("resumed without the moments" in text for text in caplog.messages)

    # Windows: the steps 2 to 4 for the conversion at 4, and 7 for the update at 7.
    assert [resumed(at, stored=False) for at in range(1, 8)] == [False, True, True, False, False, False, False]
    assert not any(resumed(at, stored=True) for at in range(1, 8))


def test_the_published_settings() -> None:
    paper = OIALRConfig.paper(delay=7)
    assert (paper.importance, paper.carry_moments, paper.delay) == ("weights", False, 7)
    assert (paper.limits.at_conversion, paper.limits.round_to) == (1.0, 1)


def test_settings_are_checked() -> None:
    with pytest.raises(UnknownNameError, match="unknown importance 'input'"):
        OIALRConfig(importance="input")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="unknown moments"):
        OIALRConfig(moments="half")  # type: ignore[arg-type]


def _trained(rank: int, size: int, sharded: bool) -> tuple[list[float], list[Tensor], bool]:
    torch.set_num_threads(1)
    world = World.from_environment(device="cpu") if size > 1 else World()
    model = small_model(dtype=torch.float64)
    engine = FSDPEngine(world) if sharded else None
    if engine is not None:
        engine.place(model)
    oialr = OIALR(
        model,
        muon_adamw(model, lr=0.01),
        settings(importance=BOTH, moments_steps=3, limits=LIMITS, rule=RULE),
        engine=engine,
    )
    losses, weighted = [], True
    for t in range(12):
        x, y = (part.chunk(size)[rank] for part in batch(t, torch.float64))
        loss = cross_entropy(oialr.model(x), y)
        loss.backward()
        oialr.optimizer.step()
        oialr.optimizer.zero_grad()
        report = oialr.step()
        weighted &= report is None or all(layer.cut_share is not None for layer in report.layers)
        losses.append(float(world.all_reduce(loss.detach().clone())) / size)
    full = [getattr(p, "full_tensor", lambda p=p: p)().detach() for p in model.parameters()]
    return losses, full, weighted


@pytest.mark.parametrize("sharded", [False, True])
def test_ranks_choose_the_same_bases_as_one_process(sharded: bool) -> None:
    alone, _, _ = _trained(0, 1, False)
    first, second = spawn(_trained, 2, sharded)
    assert first[0] == second[0] == pytest.approx(alone, rel=1e-8)
    assert first[2]
    assert all(torch.equal(p, q) for p, q in zip(first[1], second[1], strict=True))


def _tensor_parallel(rank: int, size: int) -> str:
    model, engine = on_shards(size)
    with pytest.raises(ConfigError) as error:
        OIALR(model, muon_adamw(model, lr=0.01), settings(importance="inputs"), engine=engine)
    oialr = OIALR(model, muon_adamw(model, lr=0.01), settings(importance="auto"), engine=engine)
    assert oialr._moments.importance == "weights"
    return str(error.value)


def test_tensor_parallel_layers_refuse() -> None:
    for message in spawn(_tensor_parallel, 2):
        assert message.startswith("importance is 'inputs'; under TensorEngine must be 'weights'")
