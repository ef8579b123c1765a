"""Bases that grow: sketches of the gradient, directions outside of the bases, the same function, any engine, resumes."""

from __future__ import annotations

import copy
import functools
from itertools import product
from typing import Any

import pytest
import torch
from support.small_training import CUT_NOTHING, batch, on_shards, settings, small_model, train
from support.spawn import spawn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits, Selection, low_rank_layers, muon_adamw
from hpc_oialr.distributed import World
from hpc_oialr.engines import FSDPEngine
from hpc_oialr.errors import ConfigError
from hpc_oialr.lowrank.layout import REPLICATED

ALL = Selection(keep_last=False)
LIMITS = RankLimits(at_conversion=0.75, round_to=1)
GROW: dict[str, Any] = {"grow": 0.2, "grow_steps": 2, "limits": LIMITS, "rule": FixedFraction(0.5), "frequency": 20}


def controller(model: nn.Module, optimizer: Any = None, engine: Any = None, **options: Any) -> OIALR:
    return OIALR(model, optimizer or muon_adamw(model, lr=0.01), settings(**GROW | options), engine=engine)


MODELS = {
    "linear": (lambda: nn.Sequential(nn.Linear(12, 20), nn.ReLU(inplace=True), nn.Linear(20, 8)), (6, 12)),
    "convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(6, 12, 3, stride=2, padding=1, dilation=2, padding_mode="circular"), nn.ReLU(inplace=True),
            nn.Conv2d(12, 16, 3, padding="same"),
        ),
        (6, 9, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_sketches_are_those_of_the_dense_gradient(kind: str, recompute: bool) -> None:
    build, shape = MODELS[kind]
    torch.manual_seed(0)
    model = build().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    oialr = controller(
        model, optimizer, delay=1, selection=ALL
    )  # updates after 21 steps, from sketches of the last two
    expected: dict[str, Any] = {}
    for t in range(1, 22):
        x = torch.randn(4, *shape, dtype=torch.float64)
        y = checkpoint(oialr.model, x, use_reentrant=False) if recompute else oialr.model(x)
        y.square().sum().backward()
        if t > 19:
            dense = copy.deepcopy(model)
            for layer in low_rank_layers(dense).values():
                layer.become_dense()
            dense.zero_grad()
            dense(x).square().sum().backward()
            gradients = {name: p.grad.reshape(len(p), -1) for name, p in dense.named_parameters() if p.dim() > 1}
            expected = {name: G + expected.get(name, 0) for name, G in gradients.items()}
        if t < 21:
            oialr.step()
    assert len(oialr._sketches._sums) == 2
    for name, sums in oialr._sketches._sums.items():
        G = expected[f"{name}.weight"]
        torch.testing.assert_close(sums.totals()["Y"], G @ sums.Omega)
        torch.testing.assert_close(sums.totals()["Z"], sums.Psi.mT @ G)


def test_new_directions_are_orthonormal_outside_and_lead_the_gradient() -> None:
    model = small_model(dtype=torch.float64)
    oialr = controller(model)
    train(oialr, oialr.optimizer, 23)
    for name, sums in oialr._sketches._sums.items():
        layer = low_rank_layers(model)[name]
        U, Vh = layer.U.detach(), layer.Vh.detach()
        generator = torch.Generator().manual_seed(0)
        # Two directions outside, one of which is much larger, and much that lies inside.
        out, inside = (torch.randn(layer.m, q, generator=generator, dtype=torch.float64) for q in (2, layer.r))
        out = torch.linalg.qr(out - U @ (U.mT @ out)).Q
        sums.flat.zero_()
        q = sums.Omega.shape[1]
        weights = torch.randn(2, q, generator=generator, dtype=torch.float64) * torch.tensor([[1.0], [0.01]])
        sums.totals()["Y"].copy_(out @ weights + U @ inside[: layer.r, :q].contiguous())
        for count in (1, 2):
            left, right = sums.outside(U, Vh, count, REPLICATED)
            one = torch.eye(count, dtype=torch.float64)
            torch.testing.assert_close(left.mT @ left, one)
            torch.testing.assert_close(right @ right.mT, one)  # of an empty sketch random ones
            assert max(float((U.mT @ left).abs().max()), float((Vh @ right.mT).abs().max())) < 1e-12
            assert float((out.mT @ left).norm() ** 2) == pytest.approx(count, abs=1e-3)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "MuonAdamW"])
@pytest.mark.parametrize("rule", [CUT_NOTHING, FixedFraction(0.25)])
def test_an_update_embeds_what_it_keeps(name: str, rule: Any) -> None:
    """Nothing is cut, or the state follows the cut; new entries of momenta are zero, of second moments the mean."""
    model = small_model(dtype=torch.float64)
    make = {"AdamW": torch.optim.AdamW, "SGD": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)}
    optimizer = make[name](model.parameters()) if name in make else muon_adamw(model, lr=0.01)
    average = AveragedModel(model)
    config = settings(**GROW | {"rule": rule, "limits": RankLimits(at_conversion=0.5, round_to=1)})
    oialr = OIALR(model, optimizer, config, averages=[average])
    train(oialr, optimizer, 23)
    config.limits = RankLimits(round_to=1)  # r may rise above that of the conversion
    x, y = batch(23, torch.float64)
    cross_entropy(oialr.model(x), y).backward()
    optimizer.step()
    before = {layer: [p.detach().clone() for p in layer.factors] for layer in low_rank_layers(model).values()}
    states = {layer: copy.deepcopy(optimizer.state[layer.S]) for layer in before}
    output, averaged = model(x).detach(), average(x).detach()
    report = oialr.step()
    assert report is not None
    for update in report.layers:
        assert update.new_directions == max(1, round(0.2 * update.r_before))
        assert update.cut_values == (0 if rule is CUT_NOTHING else update.r_before - (update.r - update.new_directions))
    if rule is CUT_NOTHING:
        torch.testing.assert_close(model(x), output)
        torch.testing.assert_close(average(x), averaged)
    for (layer, (U, _, Vh)), update in zip(before.items(), report.layers, strict=True):
        new, stay = update.new_directions, update.r - update.new_directions
        assert layer.r == update.r == layer.S.shape[0]
        assert layer.bases_error() < 1e-12
        P, Qh = U.mT @ layer.U.detach(), layer.Vh.detach() @ Vh.mT
        assert float(P[:, stay:].abs().max()) < 1e-12
        assert not layer.S[stay:].any()
        assert not layer.S[:, stay:].any()
        state = optimizer.state[layer.S]
        for key in state.keys() & {"exp_avg", "momentum_buffer"}:
            torch.testing.assert_close(state[key], P.mT @ states[layer][key] @ Qh.mT)
        for key in state.keys() & {"exp_avg_sq"}:
            inside = state[key][:stay, :stay]
            torch.testing.assert_close(inside, (P.mT.square() @ states[layer][key] @ Qh.mT.square())[:stay, :stay])
            others = torch.cat([state[key][stay:].flatten(), state[key][:, stay:].flatten()])
            torch.testing.assert_close(others, inside.mean().expand_as(others))
        assert new > 0


@pytest.mark.parametrize(("multiple", "share"), [(1, 0.125), (8, 0.125), (8, 0.3), (64, 0.125)])
def test_how_many_stay_and_join(multiple: int, share: float) -> None:
    limits = RankLimits(at_conversion=0.5, round_to=multiple, max_drop=0.5, min_fraction=0.05)
    for k, r in product((192, 250), (1, 16, 40, 48, 96, 128, 190)):
        most, bound = limits.most_new(r, k, share), max(r, limits.initial(k))
        for wanted in range(1, r + 1):
            stay, new = limits.renewed(wanted, r, k, share)
            assert stay >= min(r, wanted), "nothing that the rule keeps is replaced"
            assert 0 <= new <= most <= k - r
            assert stay <= r
            assert stay >= r * 0.5
            assert stay + new <= max(bound, limits.apply(wanted, r, k))
            if new:
                assert (stay + new) % multiple == 0 or stay + new == bound
            else:
                assert stay == limits.apply(wanted, r, k)
            assert limits.renewed(wanted, r, k, 0.0) == (limits.apply(wanted, r, k), 0)
    # k = 192: what the rule keeps plus an eighth of r; it rises by a multiple, and not above k / 2.
    exact = RankLimits(at_conversion=0.5, round_to=8)
    found = [exact.renewed(wanted, 48, 192, 0.125) for wanted in (20, 42, 43, 48)]
    assert found == [(26, 6), (42, 6), (48, 8), (48, 8)]
    assert exact.renewed(96, 96, 192, 0.125) == (96, 0)
    assert exact.renewed(90, 96, 192, 0.125) == (90, 6)


def teacher_loss(grow: float) -> float:
    """A student of r = 4 whose first bases do not have the teacher's columns and rows."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wanted = normal(24, 4) @ normal(4, 24) / 5
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24, bias=False)).double()
    limits = RankLimits(at_conversion=0.25, min_fraction=0.0, round_to=1)
    options: dict[str, Any] = {"delay": 1, "frequency": 20, "rule": FixedFraction(1 / 6), "selection": ALL}
    optimizer = muon_adamw(model, lr=1e-4, core_lr=0.1, selection=ALL)
    oialr = OIALR(model, optimizer, OIALRConfig(**options, limits=limits, grow=grow))
    for t in range(200):
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("first_lr", group["lr"]) * (1 - t / 200)
        x = normal(64, 24)
        loss = (oialr.model(x) - x @ wanted.mT).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        oialr.step()
    error: Tensor = low_rank_layers(model)["0"].merged_weight() - wanted
    return float(error.detach().norm() / wanted.norm())


def test_what_frozen_bases_cannot_learn() -> None:
    frozen, growing = teacher_loss(0.0), teacher_loss(0.25)
    assert frozen > 0.9
    assert growing < 0.3


# -- ranks ---------------------------------------------------------------------------------------------


def trained(rank: int, size: int, frozen: Any, steps: int = 48) -> tuple[list[float], list[dict[str, int]]]:
    torch.set_num_threads(1)
    world = World.from_environment(device="cpu") if size > 1 else World()
    model = small_model(dtype=torch.float64)
    engine = FSDPEngine(world, frozen=frozen) if frozen else None
    if engine is not None:
        engine.place(model)
    oialr = controller(model, engine=engine, importance="inputs")
    losses, rs = [], []
    for t in range(steps):
        x, y = (part.chunk(size)[rank] for part in batch(t, torch.float64))
        loss = cross_entropy(oialr.model(x), y)
        loss.backward()
        oialr.optimizer.step()
        oialr.optimizer.zero_grad()
        if oialr.step() is not None:
            rs.append(oialr.r)
        losses.append(float(world.all_reduce(loss.detach().clone())) / size)
    return losses, rs


@pytest.mark.parametrize("frozen", [None, "sharded", "replicated"])
def test_ranks_grow_as_one_process(frozen: str | None) -> None:
    """Under DDP, and under FSDP with both ways to store the bases."""
    alone, rs = trained(0, 1, None)
    assert len(rs) == 3
    for losses, found in spawn(trained, 2, frozen):
        assert found == rs
        assert losses == pytest.approx(alone, rel=1e-7)


def _tensor_parallel(rank: int, size: int) -> str:
    model, engine = on_shards(size)
    with pytest.raises(ConfigError) as error:
        controller(model, engine=engine)
    return str(error.value)


def test_tensor_parallel_layers_refuse() -> None:
    for message in spawn(_tensor_parallel, 2):
        assert message.startswith("grow is 0.2; new directions come from layers' inputs and gradients, but under Tens")


# -- surroundings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [10, 22, 23, 24, 43])
def test_resumes_bitwise_within_a_window(at: int) -> None:
    first = controller(small_model())
    train(first, first.optimizer, at)
    parts = first.state_dict(), first.tensor_state(), first.module.state_dict(), first.optimizer.state_dict()
    counters, tensors, values, moments = copy.deepcopy(parts)
    assert bool(tensors) == (at in (22, 23, 43))
    second = controller(small_model(seed=1))
    second.load_state_dict(counters, tensors)
    second.module.load_state_dict(values)
    second.optimizer.load_state_dict(moments)
    assert train(first, first.optimizer, 45 - at) == train(second, second.optimizer, 45 - at)
    for p, q in zip(first.module.parameters(), second.module.parameters(), strict=True):
        assert torch.equal(p, q)


def test_hooks_change_no_bit_of_a_step() -> None:
    """Two steps before an update with and without sketches, of a model that writes into its layers' outputs."""
    losses = []
    for grow in (0.2, 0.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(inplace=True), nn.Linear(20, 4))
        losses.append(train(oialr := controller(model, grow=grow), oialr.optimizer, 24))
    assert losses[0] == losses[1]


def test_layers_without_a_pass_and_trained_bases_do_not_grow() -> None:
    plain, unseen = controller(small_model(), grow=0.0), controller(small_model())
    for oialr in (plain, unseen):
        train(oialr, oialr.optimizer, 22)
    unseen._sketches._untie()
    unseen._sketches.tie = lambda: None  # type: ignore[method-assign]
    assert train(plain, plain.optimizer, 10) == train(unseen, unseen.optimizer, 10)
    model = small_model()
    phases = controller(model, muon_adamw(model, lr=0.01, bases_lr=0.01), bases_trained=[(10, 43)])
    seen = []
    for t in range(64):
        x, y = batch(t)
        phases.optimizer.zero_grad()
        cross_entropy(phases.model(x), y).backward()
        phases.optimizer.step()
        if (report := phases.step()) is not None:
            seen.append([layer.new_directions > 0 for layer in report.layers])
    assert seen[1:] == [[False] * 2, [True] * 2, [True] * 2]  # after 24, 44 and 64 steps


def test_wrong_settings_are_refused() -> None:
    for options, match in (
        ({"grow": 0.6}, r"grow is 0.6; must lie in \[0, 0.5\]"),
        ({"grow": 0.2, "limits": RankLimits(max_drop=0.2)}, r"grow is 0.2; must be below limits.max_drop, here 0.2"),
        ({"grow": 0.1, "train": "factors"}, r'grow is 0.1; needs frozen bases, and with train="factors" none'),
        ({"grow_steps": 0}, "grow_steps is 0; must be a whole number of at least 1"),
    ):
        with pytest.raises(ConfigError, match=match):
            OIALRConfig(**options)  # type: ignore[arg-type]
    assert OIALRConfig().steps_of_growth == 0
    assert OIALRConfig(grow=0.1).steps_of_growth == 8
    assert OIALRConfig(grow=0.1, frequency=25).steps_of_growth == 2
