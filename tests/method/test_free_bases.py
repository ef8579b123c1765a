"""Phases in which U and Vh are trained too: same function at every change, momenta carried, any number of ranks."""

from __future__ import annotations

import copy
import functools
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.small_training import CUT_NOTHING, batch, settings, small_model, train
from support.spawn import spawn
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel

from hpc_oialr import OIALR, OIALRConfig, low_rank_layers, merge, muon_adamw
from hpc_oialr.distributed import World
from hpc_oialr.engines import FSDPEngine
from hpc_oialr.errors import ConfigError, ModelError, NonFiniteError
from hpc_oialr.lowrank import dense_parameters, trainable_parameters

# The conversion is after 4 steps, updates are after 7, 10, 13, ...
PHASES: dict[str, dict[str, Any]] = {
    "factors": {"train": "factors"},
    "middle": {"bases_trained": [(6, 12)]},
    "end": {"bases_trained": [(2, 8), (11, None)]},
}


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "MuonAdamW":
        return muon_adamw(model, lr=0.02, bases_lr=0.01)
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def controlled(name: str, phases: str, dtype: torch.dtype = torch.float32, **options: Any) -> OIALR:
    model = small_model(dtype=dtype)
    return OIALR(model, optimizer_of(name, model), settings(**PHASES[phases], **options))


def run(oialr: OIALR, steps: int) -> list[float]:
    return train(oialr, oialr.optimizer, steps)


def trained(oialr: OIALR) -> set[bool]:
    """Whether bases have gradients, and stand in the optimizer with moments of their own."""
    layers = low_rank_layers(oialr.module).values()
    held = {id(p) for group in oialr.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for layer in layers for p in layer.factors)
    bases = [p for layer in layers for p in (layer.U, layer.Vh)]
    found = {p.requires_grad for p in bases}
    if found == {False}:
        assert all(p.grad is None and p not in oialr.optimizer.state for p in bases)
    return found


@pytest.mark.parametrize("name", ["AdamW", "MuonAdamW", "SGD"])
def test_bases_are_trained_in_their_phases_only(name):
    oialr = controlled(name, "end")
    wrong: list[int] = []
    for t in range(15):
        if t >= 4:
            expected = oialr.config.trains_bases(t)
            assert expected == (t < 8 or t >= 11)
            before = {layer: layer.U.detach().clone() for layer in low_rank_layers(oialr.module).values()}
            assert trained(oialr) == {expected}
        x, y = batch(t)
        oialr.optimizer.zero_grad()
        cross_entropy(oialr.model(x), y).backward()
        oialr.optimizer.step()
        if t >= 4:
            moved = {not torch.equal(U, layer.U) for layer, U in before.items()}
            wrong += [t] * (moved != {expected})
        oialr.step()
    assert not wrong
    assert all(layer.bases_error() > 1e-3 for layer in low_rank_layers(oialr.module).values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("phases", PHASES)
def test_no_change_of_phase_or_basis_changes_the_function(phases, dtype, tolerance):
    """Cutting nothing: what is left is rounding."""
    oialr, changes = controlled("MuonAdamW", phases, dtype, rule=CUT_NOTHING), 0
    oialr.config.delay = 0  # for the largest number of changes
    x, _ = batch(99, dtype)

    def bases() -> list[torch.Tensor]:
        return [layer.U.detach().clone() for layer in low_rank_layers(oialr.module).values()]

    for t in range(18):
        inputs, y = batch(t, dtype)
        oialr.optimizer.zero_grad()
        cross_entropy(oialr.model(inputs), y).backward()
        oialr.optimizer.step()
        before, output = bases(), oialr.module(x).detach()
        oialr.step()
        changes += bool(before) and not all(map(torch.equal, before, bases()))
        assert (oialr.module(x) - output).abs().max() <= tolerance * output.abs().max(), t
    assert changes >= 4


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("name", ["MuonAdamW", "SGD", "AdamW"])
def test_momenta_and_gradients_are_those_of_the_new_factors(name, cut):
    """The momentum of a loss <G, W> is its gradient: it must be that of the new factors after an update with drift."""
    oialr = controlled(name, "factors", torch.float64, frequency=6, importance="weights")
    run(oialr, 9)
    if not cut:
        oialr.config.rule = CUT_NOTHING
    layers = low_rank_layers(oialr.module)
    key = "exp_avg" if name == "AdamW" else "momentum_buffer"
    generator = torch.Generator().manual_seed(3)
    G = {n: torch.randn(x.m, x.n, generator=generator, dtype=torch.float64) for n, x in layers.items()}

    def gradients(layer, of):
        U, S, Vh = (p.detach() for p in layer.factors)
        return of @ Vh.mT @ S.mT, U.mT @ of @ Vh.mT, S.mT @ U.mT @ of

    for n, layer in layers.items():
        assert layer.bases_error() > 1e-3
        for p, value in zip(layer.factors, gradients(layer, G[n]), strict=True):
            oialr.optimizer.state[p][key] = value.clone()
            p.grad = value.clone()
    r = oialr.r
    oialr.step()
    assert (oialr.r != r) == cut
    for n, layer in layers.items():
        assert layer.bases_error() < 1e-12
        for p, expected in zip(layer.factors, gradients(layer, G[n]), strict=True):
            torch.testing.assert_close(oialr.optimizer.state[p][key], expected, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(p.grad, expected, rtol=1e-9, atol=1e-9)


def test_gradients_of_drifted_bases_against_float64():
    oialr = controlled("MuonAdamW", "factors")
    run(oialr, 9)
    x, y = batch(20)
    oialr.optimizer.zero_grad()
    cross_entropy(oialr.model(x), y).backward()
    exact = copy.deepcopy(oialr.module).double()
    weights = {n: x.merged_weight().requires_grad_() for n, x in low_rank_layers(exact).items()}
    hidden = x.double()
    for n, module in exact.named_children():
        hidden = nn.functional.linear(hidden, weights[n], module.bias) if n in weights else module(hidden)
    cross_entropy(hidden, y).backward()
    for n, layer in low_rank_layers(oialr.module).items():
        U, S, Vh = (p.detach().double() for p in layer.factors)
        G = weights[n].grad
        for p, expected in zip(layer.factors, (G @ Vh.mT @ S.mT, U.mT @ G @ Vh.mT, S.mT @ U.mT @ G), strict=True):
            assert (p.grad - expected).norm() < 1e-5 * expected.norm()


def test_frozen_all_along_is_the_published_method():
    """A phase that is over before the conversion leaves every bit as it is."""
    first, second = (
        controlled("AdamW", "middle"),
        OIALR(model := small_model(), optimizer_of("AdamW", model), settings()),
    )
    first.config.bases_trained = [(0, 3)]
    assert run(first, 15) == run(second, 15)


# -- ranks ---------------------------------------------------------------------------------------------


def losses_of(rank: int, size: int, name: str, phases: str, dtype: torch.dtype, accumulation: int) -> Any:
    torch.set_num_threads(1)
    if size > 1:
        World.from_environment(device="cpu")
    oialr = controlled(name, phases, dtype)
    losses, wrapper = [], oialr.model
    for t in range(20):
        x, y = (part.chunk(size)[rank] for part in batch(t, dtype))
        total = torch.zeros((), dtype=torch.float64)
        for i, (a, b) in enumerate(zip(x.chunk(accumulation), y.chunk(accumulation), strict=True)):
            with oialr.no_sync() if i < accumulation - 1 else nullcontext():
                loss = cross_entropy(oialr.model(a), b) / accumulation
                loss.backward()
            total += loss.detach().double()
        oialr.optimizer.step()
        oialr.optimizer.zero_grad()
        oialr.step()
        losses.append(float(oialr.engine.world.all_reduce(total) / size))
        assert oialr.model is wrapper
    return losses, oialr.r


@pytest.mark.parametrize(("name", "accumulation"), [("AdamW", 1), ("MuonAdamW", 2)])
@pytest.mark.parametrize("phases", ["factors", "end"])
def test_two_ranks_are_equal_to_one(name, phases, accumulation):
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        alone, r = losses_of(0, 1, name, phases, dtype, accumulation)
        work = functools.partial(losses_of, name=name, phases=phases, dtype=dtype, accumulation=accumulation)
        for losses, found in spawn(work, 2):
            assert found == r
            assert losses == pytest.approx(alone, rel=tolerance)


# -- resume --------------------------------------------------------------------------------------------


def state_of(oialr: OIALR) -> dict[str, Any]:
    parts = {"model": oialr.module, "optimizer": oialr.optimizer, "oialr": oialr}
    state = {name: part.state_dict() for name, part in parts.items()}
    return copy.deepcopy(state | {"tensors": oialr.tensor_state()})


def load(oialr: OIALR, state: dict[str, Any], order: tuple[str, ...] = ("oialr", "model", "optimizer")) -> None:
    for part in order:
        if part == "oialr":
            oialr.load_state_dict(copy.deepcopy(state["oialr"]), state["tensors"])
        else:
            {"model": oialr.module, "optimizer": oialr.optimizer}[part].load_state_dict(copy.deepcopy(state[part]))


@pytest.mark.parametrize(
    "order",
    [("oialr", "model", "optimizer"), pytest.param(("model", "oialr", "optimizer"), marks=pytest.mark.long)],
)
@pytest.mark.parametrize("name", ["AdamW", "MuonAdamW"])
@pytest.mark.parametrize("phases", PHASES)
def test_a_resumed_run_has_the_same_bits(phases, name, order):
    for at in (3, 5, 8, 11, 13):
        first = controlled(name, phases)
        run(first, at)
        state = state_of(first)
        second = controlled(name, phases)
        load(second, state, order)
        assert run(first, 20 - at) == run(second, 20 - at), at
        for a, b in zip(first.module.state_dict().values(), second.module.state_dict().values(), strict=True):
            assert torch.equal(a, b)
        # Back into a phase that is over, as after a spike of the loss.
        load(second, state, order)
        third = controlled(name, phases)
        run(third, at)
        assert run(second, 4) == run(third, 4)


def test_a_phase_is_not_resumed_without_its_settings():
    first = controlled("AdamW", "factors")
    run(first, 6)
    model = small_model()
    second = OIALR(model, optimizer_of("AdamW", model), settings())
    with pytest.raises(ModelError, match=r"U and Vh of 0 are trained in the checkpoint's phase"):
        second.load_state_dict(first.state_dict())


def test_a_layer_that_is_dense_again_leaves_no_bases_in_the_optimizer():
    oialr = controlled("MuonAdamW", "factors")
    before = small_model().state_dict()
    sizes = [len(group["params"]) for group in oialr.optimizer.param_groups]
    run(oialr, 8)
    oialr.module.load_state_dict(before)
    assert [len(group["params"]) for group in oialr.optimizer.param_groups] == sizes
    assert set(oialr.optimizer.state) <= set(oialr.module.parameters())


# -- surroundings --------------------------------------------------------------------------------------


def test_a_scaled_loss_gives_the_same_run():
    plain, scaled = controlled("AdamW", "end"), controlled("AdamW", "end")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    for t in range(16):
        x, y = batch(t)
        for oialr, each in ((plain, None), (scaled, scaler)):
            oialr.optimizer.zero_grad()
            loss = cross_entropy(oialr.model(x), y)
            (loss if each is None else each.scale(loss)).backward()
            if each is None:
                oialr.optimizer.step()
            else:
                each.step(oialr.optimizer)
                each.update()
            oialr.step()
    for a, b in zip(plain.module.state_dict().values(), scaled.module.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_merged_model_within_a_phase_is_the_model():
    oialr = controlled("MuonAdamW", "factors")
    run(oialr, 9)
    x, _ = batch(50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dense = merge(oialr.module)
    torch.testing.assert_close(dense(x), oialr.module(x), rtol=1e-5, atol=1e-5)


def test_counts_of_parameters():
    oialr = controlled("AdamW", "middle")
    dense = trainable_parameters(oialr.module)
    for steps in (5, 3, 6):
        run(oialr, steps)
        assert dense_parameters(oialr.module) == dense
    frozen = trainable_parameters(oialr.module)
    factors = controlled("AdamW", "factors")
    run(factors, 14)
    layers = low_rank_layers(factors.module).values()
    assert factors.r == oialr.r
    assert trainable_parameters(factors.module) == frozen + sum(x.r * (x.m + x.n) for x in layers)


def test_values_that_are_not_finite_change_nothing():
    oialr = controlled("AdamW", "factors")
    run(oialr, 6)
    with torch.no_grad():
        low_rank_layers(oialr.module)["2"].U[0, 0] = torch.nan
    before = copy.deepcopy(oialr.module.state_dict())
    with pytest.raises(NonFiniteError, match=r"NaN or Inf in the weight of 2"):
        oialr.step()
    for a, b in zip(before.values(), oialr.module.state_dict().values(), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


def test_what_cannot_be_trained_right_is_refused_at_the_start():
    config = settings(train="factors")

    def refused(optimizer, match, model=None, **options):
        model = model or small_model()
        with pytest.raises(ConfigError, match=match) as caught:
            OIALR(model, optimizer(model), config, **options)
        assert str(caught.value).startswith("train is 'factors'; U and Vh cannot be trained here: ")

    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    refused(muon_adamw, r"a group for cores and none for bases.*muon_adamw\(model, bases_lr=")
    refused(lambda m: torch.optim.ASGD(m.parameters()), "ASGD keeps copies or a history of weights")
    refused(lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS keeps copies or a history of weights")
    model = small_model()
    refused(sgd, "running averages", model, averages=[AveragedModel(model)])


def _sharded(rank: int, size: int) -> str:
    world = World.from_environment(device="cpu")
    model, engine = small_model(), FSDPEngine(world)
    engine.place(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError) as caught:
        OIALR(model, optimizer, settings(bases_trained=[(5, None)]), engine=engine)
    return str(caught.value)


def test_engines_that_shard_factors_refuse():
    for text in spawn(_sharded, 2):
        assert text.startswith("bases_trained is [(5, None)]; U and Vh cannot be trained here: FSDPEngine shards")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bases_trained": [(5, 5)]}, "pairs of times"),
        ({"bases_trained": [(5, None), (7, 9)]}, "pairs of times"),
        ({"bases_trained": [(5, 9), (7, 12)]}, "pairs of times"),
        ({"train": "factors", "bases_trained": [(5, 9)]}, "leave out bases_trained"),
        ({"train": "factors", "factor_dtype": "bfloat16"}, "lost in rounding"),
    ],
)
def test_settings_are_checked(options, match):
    with pytest.raises(ConfigError, match=match):
        OIALRConfig(**options)


def test_what_was_gathered_of_inputs_and_gradients_follows_the_bases():
    """The same batch before and after bases are made orthonormal gives the same second moments, in float64."""
    model = small_model(dtype=torch.float64)
    config = settings(train="factors", importance="inputs and gradients", frequency=60, delay=2)
    oialr = OIALR(model, torch.optim.SGD(model.parameters(), lr=0.0), config)
    train(oialr, oialr.optimizer, 59, same=True)  # an update after 62 steps is prepared in three
    moments, generator = oialr._moments._sums, torch.Generator().manual_seed(5)
    for layer in low_rank_layers(model).values():
        for basis in (layer.U, layer.Vh):
            basis.data += 0.1 * torch.randn(basis.shape, generator=generator, dtype=torch.float64)
    for sums in moments.values():
        sums.flat.zero_()
    train(oialr, oialr.optimizer, 1, same=True)
    assert len(moments) == len(oialr.targets) == 2
    with oialr.engine.changing(model):
        for target in oialr.targets:
            oialr._basis.orthonormalise(target, oialr._moments)
    once = {name: sums.flat.clone() for name, sums in moments.items()}
    train(oialr, oialr.optimizer, 1, same=True)
    for name, sums in moments.items():
        torch.testing.assert_close(sums.flat, 2 * once[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("importance", ["inputs", "inputs and gradients"])
def test_bases_chosen_by_moments_are_trained_and_resumed(importance):
    options = {"importance": importance, "moments_steps": 3}
    first = controlled("MuonAdamW", "end", **options)
    run(first, 9)
    state, second = state_of(first), controlled("MuonAdamW", "end", **options)
    load(second, state)
    assert run(first, 11) == run(second, 11)
