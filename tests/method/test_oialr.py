"""The controller in a training loop: schedule, exactness of every change, optimizer, averages, errors."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hpc_oialr import (
    OIALR,
    FixedFraction,
    MuonAdamW,
    OIALRConfig,
    RankLimits,
    RelativeCutoff,
    Selection,
    merge,
    muon_adamw,
    trainable_parameters,
)
from hpc_oialr.errors import ModelError, NonFiniteError

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "Adam amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=1e-2, amsgrad=True, foreach=True),
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9),
    "SGD plain": lambda m: torch.optim.SGD(m.parameters(), lr=1e-2),
    "AdamW, then MuonAdamW": lambda m: muon_adamw(m, lr=1e-2, adamw_lr=1e-2, dense_algorithm="adamw"),
    "MuonAdamW": lambda m: muon_adamw(m, lr=0.02, adamw_lr=1e-2),
}
GRADUAL = {"rule": FixedFraction(0.25), "limits": RankLimits(max_drop=0.2, at_conversion=0.5)}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.Linear(32, 4)]
    return nn.Sequential(*layers).to(dtype)


def task(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 16, generator=generator).to(dtype), torch.randint(0, 4, (64,), generator=generator)


def train(oialr: OIALR, steps: int, *, average: AveragedModel | None = None) -> list[float]:
    dtype = next(oialr.module.parameters()).dtype
    (x, y), losses = task(dtype), []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(oialr.model(x), y)
        loss.backward()
        oialr.optimizer.step()
        oialr.optimizer.zero_grad()
        if average is not None:
            average.update_parameters(oialr.module)
        oialr.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_through_conversion_and_cuts(name: str) -> None:
    model = network()
    optimizer = OPTIMIZERS[name](model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    oialr = OIALR(model, optimizer, OIALRConfig(delay=10, frequency=5, layer_share_step=1.0, **GRADUAL))
    before = train(oialr, 9)
    assert oialr.r == {}
    assert train(oialr, 1)
    assert oialr.r == {"0": 8, "2": 16, "4": 16}
    after = train(oialr, 50)
    scheduler.step()
    assert oialr.r == {"0": 4, "2": 8, "4": 8}
    assert after[-1] < before[0]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} == held
    assert set(optimizer.state) <= {p for group in optimizer.param_groups for p in group["params"]}
    for p, state in optimizer.state.items():
        assert all(v.shape in (p.shape, ()) for v in state.values() if isinstance(v, torch.Tensor))
    assert trainable_parameters(model) < 0.25 * trainable_parameters(merge(model))


def test_schedule_is_the_papers() -> None:
    """Conversion at d, an update every nu steps after it, last layers first, a growing share of them."""
    limits = RankLimits(round_to=1)
    config = OIALRConfig(delay=4, frequency=3, rule=RelativeCutoff(0.999), limits=limits, layer_share_step=0.34)
    model = network()
    oialr = OIALR(model, torch.optim.SGD(model.parameters(), lr=0.0), config)
    events = {}
    for t in range(1, 15):
        report = oialr.step()
        if report is not None:
            events[t] = (
                report.kind,
                [layer.name for layer in report.layers],
                [layer.r for layer in report.layers],
            )
    assert events == {
        4: ("conversion", ["0", "2", "4"], [16, 32, 32]),
        7: ("update", ["4"], [16]),
        10: ("update", ["2", "4"], [16, 8]),
        13: ("update", ["0", "2", "4"], [8, 8, 4]),
    }


@pytest.mark.parametrize("bound", [1e-4, 1e-15], ids=["no repair", "repair"])
def test_updates_without_a_cut_change_nothing_but_the_basis(bound: float) -> None:
    torch.manual_seed(0)
    config = OIALRConfig(delay=1, frequency=2, rule=FixedFraction(1.0), layer_share_step=1.0, orthogonality_bound=bound)
    model = network(torch.float64)
    oialr = OIALR(model, torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9), config)
    train(oialr, 2)
    x, _ = task(torch.float64)
    before, weights = (
        oialr.model(x),
        {name: layer.S for name, layer in enumerate(model) if hasattr(layer, "S")},
    )
    report = oialr.step()
    assert report is not None
    assert report.kind == "update"
    assert not report.reshaped
    torch.testing.assert_close(oialr.model(x), before, rtol=0, atol=1e-12)
    assert all(model[i].S is core for i, core in weights.items()), "no shape changed, so no new parameter"
    for layer in (model[0], model[2]):
        torch.testing.assert_close(layer.S, torch.diag(layer.S.diagonal()), rtol=0, atol=1e-14)
        torch.testing.assert_close(layer.U.mT @ layer.U, torch.eye(layer.r, dtype=torch.float64), rtol=0, atol=1e-13)


def test_sgd_with_momentum_at_full_r_equals_projected_dense_training() -> None:
    """U and Vh square: freezing them loses nothing, so low-rank training must equal dense training exactly."""
    dense, low = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double(), None
    low = copy.deepcopy(dense)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (dense, low)]
    config = OIALRConfig(delay=5, frequency=4, rule=FixedFraction(1.0), layer_share_step=1.0)
    oialr = OIALR(low, optimizers[1], config)
    for _ in range(20):
        x = torch.randn(16, 8, dtype=torch.float64)
        losses = []
        for model, optimizer in zip((dense, oialr.model), optimizers, strict=True):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        oialr.step()
        assert losses[0] == pytest.approx(losses[1], rel=1e-11)


def test_muon_at_full_r_equals_dense_muon() -> None:
    # Square layers: at r = k the frozen bases span everything, and Muon's step commutes with rotations.
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    low = copy.deepcopy(dense)
    optimizers = [MuonAdamW([m[0].weight, m[2].weight], lr=0.05, weight_decay=0.1) for m in (dense, low)]
    config = OIALRConfig(delay=5, frequency=4, rule=FixedFraction(1.0), layer_share_step=1.0, core_lr_scale=1.0)
    oialr = OIALR(low, optimizers[1], config)
    for step in range(16):
        x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        y = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(100 + step))
        losses = []
        for model, optimizer in zip((dense, oialr.model), optimizers, strict=True):
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        oialr.step()
        assert losses[0] == pytest.approx(losses[1], rel=1e-12 if step <= 5 else 1e-9)
    assert oialr.r == {"0": 6, "2": 6}


def test_averages_follow() -> None:
    model = network()
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    config = OIALRConfig(delay=5, frequency=4, rule=FixedFraction(0.5), layer_share_step=1.0)
    oialr = OIALR(model, torch.optim.AdamW(model.parameters(), lr=1e-2), config, averages=[ema])
    train(oialr, 4, average=ema)
    expected = 0.9 * ema.module[2].weight
    train(oialr, 1, average=ema)
    # The square layer keeps all of its average: its frozen bases span everything.
    expected += 0.1 * model[2].weight.detach()
    torch.testing.assert_close(ema.module[2].weight, expected, rtol=0, atol=1e-5)
    train(oialr, 30, average=ema)
    assert {n: p.shape for n, p in ema.module.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    for layer, twin in ((model[0], ema.module[0]), (model[2], ema.module[2])):
        assert torch.equal(layer.U, twin.U)
        assert not twin.S.requires_grad


def test_conversion_layer_by_layer_when_stable() -> None:
    config = OIALRConfig(delay=4, frequency=100, stability_frequency=2, stability_threshold=0.99, stability_patience=2)
    model = network()
    oialr = OIALR(model, torch.optim.SGD(model.parameters(), lr=0.0), config)
    kinds = {}
    for t in range(1, 13):
        if 4 <= t <= 8:
            with torch.no_grad():
                model[2].weight.copy_(torch.randn(32, 32))
        oialr.optimizer.step()
        report = oialr.step()
        if report is not None:
            kinds[t] = (report.kind, [u.name for u in report.layers], [u.stability for u in report.layers])
    assert kinds[2] == ("stability", ["0", "2", "4"], [None, None, None])
    assert kinds[6][:2] == ("conversion", ["0", "4"])
    assert kinds[8][0] == "stability"
    assert kinds[8][1] == ["2"]
    assert abs(kinds[8][2][0]) < 0.6
    assert kinds[12][:2] == ("conversion", ["2"])


def test_factor_dtype_and_drift_repair() -> None:
    config = OIALRConfig(delay=1, frequency=1, rule=FixedFraction(1.0), layer_share_step=1.0, factor_dtype="bfloat16")
    model = network()
    oialr = OIALR(model, torch.optim.SGD(model.parameters(), lr=1e-3), config)
    losses = train(oialr, 40)
    assert model[2].U.dtype == torch.bfloat16
    assert model[2].S.dtype == torch.float32
    report = oialr.step()
    assert report is not None
    assert all(u.orthogonality_error_U < 2e-2 for u in report.layers), "drift must not grow with updates"
    assert losses[-1] < losses[0]


def test_resume_into_a_fresh_model_is_bitwise() -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, OIALR]:
        model = network()
        optimizer = muon_adamw(model)
        config = OIALRConfig(delay=6, frequency=4, layer_share_step=0.5, stability_frequency=2, **GRADUAL)
        return model, optimizer, OIALR(model, optimizer, config)

    for stop in (3, 6, 9, 14, 22):
        model, optimizer, oialr = fresh()
        train(oialr, stop)
        state, tensors = json.loads(json.dumps(oialr.state_dict())), oialr.tensor_state()
        weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        expected = train(oialr, 30 - stop)
        twin, other, resumed = fresh()
        resumed.load_state_dict(state, tensors)
        twin.load_state_dict(weights)
        other.load_state_dict(moments)
        assert train(resumed, 30 - stop) == expected
        assert resumed.state_dict() == oialr.state_dict()


def test_measured_bases_belong_to_the_checkpoint() -> None:
    """Those of the run it is loaded into are forgotten, and a checkpoint without its own is refused."""
    config = OIALRConfig(delay=2, stability_frequency=2, stability_threshold=0.5, stability_patience=1)
    oialr, other = (OIALR(m, torch.optim.SGD(m.parameters(), lr=0.01), config) for m in (network(), network()))
    start = oialr.state_dict(), oialr.tensor_state()
    train(oialr, 3)
    oialr.load_state_dict(*start)
    (train(oialr, 2), train(other, 2))
    assert oialr.r == other.r == {}, "nothing to compare the first measurement with"
    with pytest.raises(ModelError, match=r"Store oialr.tensor_state\(\) beside oialr.state_dict\(\)"):
        other.load_state_dict(oialr.state_dict())


def test_nan_is_caught_before_anything_changes() -> None:
    model = network()
    oialr = OIALR(model, torch.optim.SGD(model.parameters(), lr=0.0), OIALRConfig(delay=1))
    with torch.no_grad():
        model[4].weight[0, 0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match="NaN or Inf in the weight of 4; an SVD needs finite values"):
        oialr.step()
    assert all(torch.equal(v, model.state_dict()[k]) or k == "4.weight" for k, v in before.items())


def test_wrong_optimizer_is_refused() -> None:
    model = network()
    other = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(
        ModelError, match=r"optimizer holds 8 of 8 parameters that are not the model's, the first of shape"
    ):
        OIALR(model, other)
    with pytest.raises(ModelError, match="no layer of the model can be converted"):
        OIALR(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            OIALRConfig(selection=Selection(include=("none",))),
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight] = {"momentum_buffer": torch.zeros(32, 16, device="meta")}
    with pytest.raises(ModelError, match=r"state 'momentum_buffer' of 0.weight is on meta, the parameter on cpu"):
        OIALR(model, optimizer)


def test_checkpoint_of_another_model_is_refused() -> None:
    model = network()
    oialr = OIALR(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ModelError, match="low-rank layer 'encoder.0' that this model and selection do not have"):
        oialr.load_state_dict({"t": 5, "updates": 0, "r": {"encoder.0": 3}, "streaks": {}})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_accumulation_clipping_and_checkpointing(dtype: torch.dtype) -> None:
    from torch.utils.checkpoint import checkpoint

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    oialr = OIALR(model, optimizer, OIALRConfig(delay=5, frequency=5, layer_share_step=1.0, **GRADUAL))
    (x, y), losses = task(), []
    for _ in range(30):
        for half, target in zip(x.chunk(2), y.chunk(2), strict=True):
            with torch.autocast("cpu", dtype):
                out = checkpoint(oialr.model, half, use_reentrant=False)
                loss = nn.functional.cross_entropy(out, target) / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        oialr.step()
        losses.append(loss.item())
    assert oialr.r["4"] == 8
    assert losses[-1] < losses[0]


def test_memory_of_the_conversion_stays_below_dense() -> None:
    """Layer by layer: weights, moments and factors together never pass what dense training holds."""
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(6)))
    optimizer = torch.optim.AdamW(model.parameters())
    limits = RankLimits(at_conversion=0.5)
    oialr = OIALR(model, optimizer, OIALRConfig(delay=2, frequency=100, limits=limits))
    held = []
    original = oialr._basis.convert

    def convert(*args: object) -> None:
        original(*args)  # type: ignore[arg-type]
        state = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
        held.append(sum(x.numel() for x in [*model.parameters(), *state]))

    oialr._basis.convert = convert  # type: ignore[assignment]
    for _ in range(2):
        model(torch.randn(4, 128)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if oialr.t == 0:
            dense = sum(x.numel() for x in model.parameters()) * 3
        oialr.step()
    assert held == sorted(held, reverse=True)
    assert held[0] < dense


def test_one_report_holds_all_that_a_step_did() -> None:
    """A measurement in the step of a conversion, and an update of what was low-rank before it."""
    model = network()
    config = OIALRConfig(
        delay=2,
        frequency=2,
        rule=FixedFraction(0.25),
        limits=RankLimits(max_drop=0.25),
        layer_share_step=1.0,
        stability_frequency=2,
        stability_threshold=0.5,
        stability_patience=1,
    )
    oialr = OIALR(model, torch.optim.SGD(model.parameters(), lr=1e-2), config)
    late = oialr.targets[-1]
    reports = {}
    for step in range(1, 9):
        nn.functional.cross_entropy(oialr.model(task()[0]), task()[1]).backward()
        oialr.optimizer.step()
        oialr.optimizer.zero_grad()
        if late.low_rank is None and step < 8:
            # The last layer settles in the step in which the others are updated.
            real = oialr._due_for_conversion
            oialr._due_for_conversion = lambda real=real: [t for t in real() if t is not late]  # type: ignore[method-assign]
            reports[step] = oialr.step()
            oialr._due_for_conversion = real  # type: ignore[method-assign]
        else:
            reports[step] = oialr.step()
    assert [event.kind for event in reports[4].all] == ["stability", "conversion"]
    assert [event.kind for event in reports[6].all] == ["stability", "update"]
    assert [event.kind for event in reports[8].all] == ["stability", "conversion", "update"]
    assert [layer.name for layer in reports[8].all[1].layers] == [late.name]
    assert late.name not in [layer.name for layer in reports[8].layers]
    assert reports[8].earlier[0].t == 8
    assert reports[8].reshaped
