"""What users do to weights between OIALR(...), the conversion and the updates."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RelativeCutoff, Selection, merge
from hpc_oialr.errors import ModelError
from hpc_oialr.method.report import UpdateReport

X = torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 6, (24,), generator=torch.Generator().manual_seed(2))


def model_of(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for n, m in zip((16, *widths), (*widths, 6), strict=True):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def controller(model: nn.Module, *, delay: int = 3, frequency: int = 2) -> OIALR:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = OIALRConfig(delay=delay, frequency=frequency, rule=FixedFraction(0.5), layer_share_step=1.0)
    return OIALR(model, optimizer, config)


def train(oialr: OIALR, steps: int) -> list[UpdateReport | None]:
    reports = []
    for _ in range(steps):
        F.cross_entropy(oialr.model(X), Y).backward()
        oialr.optimizer.step()
        oialr.optimizer.zero_grad()
        reports.append(oialr.step())
    return reports


def test_frozen_before_the_conversion_keeps_its_value_until_it_is_trained_again() -> None:
    model = model_of(20, 12)
    oialr = controller(model)
    train(oialr, 1)
    model[0].requires_grad_(False)
    W = model[0].weight.detach().clone()
    train(oialr, 8)
    assert oialr.r["0"] == 16, "nothing is cut off what is frozen"
    assert oialr.r["2"] < 12
    assert not model[0].S.requires_grad
    torch.testing.assert_close(merge(model)[0].weight.detach(), W, rtol=0, atol=1e-5)
    model[0].requires_grad_(True)
    before = model[0].S.detach().clone()
    train(oialr, 1)
    assert not torch.equal(model[0].S, before)
    assert not model[0].U.requires_grad
    train(oialr, 4)
    assert oialr.r["0"] < 16


def test_frozen_from_the_start_waits_and_is_converted_once_trained() -> None:
    model = model_of(20, 12)
    model[0].weight.requires_grad_(False)
    oialr = controller(model)
    assert oialr.layers == ["0", "2"]
    W = model[0].weight.detach().clone()
    train(oialr, 6)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, W)
    model[0].weight.requires_grad_(True)
    (report,) = train(oialr, 1)
    assert [event.kind for event in report.all] == ["conversion", "update"]  # type: ignore[union-attr]
    assert model[0].S.requires_grad
    assert not torch.allclose(merge(model)[0].weight, W, atol=1e-4)


def test_switched_off_at_each_step_only_is_not_frozen() -> None:
    """Two networks trained in turn: requires_grad is off whenever oialr.step() is called."""
    model = model_of(20, 12)
    oialr = controller(model)
    for _ in range(9):
        for p in model.parameters():
            p.requires_grad_(True)
        F.cross_entropy(oialr.model(X), Y).backward()
        oialr.optimizer.step()
        oialr.optimizer.zero_grad()
        for p in model.parameters():
            p.requires_grad_(False)
        oialr.step()
    assert oialr.r["0"] < 16
    assert oialr.r["2"] < 12


def test_norms_of_clipping_do_not_see_the_bases() -> None:
    model = model_of(20, 12)
    oialr = controller(model, frequency=100)
    train(oialr, 3)
    norms = []
    for switch in (False, True):
        if switch:
            model.requires_grad_(True)
        F.cross_entropy(oialr.model(X), Y).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)))
        oialr.optimizer.zero_grad()
    assert norms[0] == norms[1]
    assert len([p for p in model.parameters() if p.requires_grad]) == 6


def tag(layer: nn.Linear) -> None:
    layer.U = "mine"  # type: ignore[assignment]


def tie(layer: nn.Linear) -> None:
    layer.register_buffer("copy", layer.weight.data)


def mask(layer: nn.Linear) -> None:
    layer.weight.register_hook(lambda g: g.triu())


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (tag, "attributes of its own that a low-rank layer needs: U"),
        (tie, "shares memory with 2.copy"),
        (mask, "has a gradient hook"),
    ],
)
def test_made_unfit_after_the_start(act, reason: str) -> None:
    model = model_of(20, 12)
    oialr = controller(model)
    train(oialr, 1)
    act(model[2])
    with pytest.warns(UserWarning, match=re.escape("these layers stay dense: 2 (its") + f".*{reason}|2 .*{reason}"):
        train(oialr, 3)
    assert list(oialr.r) == ["0"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(oialr, 4)
    assert oialr.r["0"] < 16


def test_hooked_weights_go_on_and_hooks_after_accumulation_are_named() -> None:
    calls: list[str] = []
    model = model_of(20, 12)
    model[0].weight.register_hook(lambda g: calls.append("gradient"))
    with pytest.warns(UserWarning, match=r"these layers stay dense: 0 \(its weight has a gradient hook"):
        oialr = controller(model)
    model[2].weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    with pytest.warns(UserWarning, match=r"hooks on the weights of 2 are not called .* on layer.S"):
        train(oialr, 3)
    assert calls == ["gradient", "accumulated"] * 3 or calls == ["accumulated", "gradient"] * 3
    calls.clear()
    train(oialr, 1)
    assert calls == ["gradient"]


def test_nothing_to_convert() -> None:
    model = model_of(20)
    model[0].n = "a tag"  # type: ignore[assignment]
    with pytest.warns(UserWarning, match=r"stay dense: 0 .*needs: n"):
        oialr = controller(model)
    assert oialr.layers == []
    twin = model_of(20)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    train(oialr, 6)
    for _ in range(6):
        F.cross_entropy(twin(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model[0].weight, twin[0].weight), "trained as without OIALR"
    with pytest.raises(ModelError, match="no layer of the model can be converted"):
        OIALR(twin, optimizer, OIALRConfig(selection=Selection(exclude=("0",))))


@pytest.mark.parametrize("act", ["clamp", "decay"])
def test_a_write_to_the_bases_is_an_error(act: str) -> None:
    model = model_of(20, 12)
    oialr = controller(model, frequency=3)
    train(oialr, 4)
    with torch.no_grad():
        for p in model.parameters():
            if act == "clamp":
                p.clamp_(-0.05, 0.05)
            else:
                p.data.mul_(0.999)
    with pytest.warns(UserWarning, match="U or Vh of 0, 2 is not orthonormal"):
        merge(model)
    with pytest.raises(ModelError, match=r"U or Vh of (0|2|LowRank.*) is not orthonormal any more .*model.parameters"):
        train(oialr, 2)


@pytest.mark.parametrize("made", ["averaged", "copied", "flattened"])
def test_bases_written_in_the_loop_are_an_error_in_the_next_forward_pass(made: str) -> None:
    """A copy of a low-rank model whose parameters are averaged one by one, and parameters set from a vector."""
    model = model_of(20, 12)
    oialr = controller(model, frequency=1)
    train(oialr, 4)
    if made == "averaged":
        other: nn.Module = torch.optim.swa_utils.AveragedModel(model)
    else:
        other = copy.deepcopy(model)
    other(X)
    oialr.config.rule = FixedFraction(1.0)
    train(oialr, 1)
    if made == "averaged":
        other.update_parameters(model)  # type: ignore[operator]
        other(X)
        train(oialr, 1)
        other.update_parameters(model)  # type: ignore[operator]
    elif made == "copied":
        with torch.no_grad():
            for p, q in zip(other.parameters(), model.parameters(), strict=True):
                p.lerp_(q, 0.5)
    else:
        vector = nn.utils.parameters_to_vector(other.parameters())
        nn.utils.vector_to_parameters(vector, other.parameters())
        other(X)
        nn.utils.vector_to_parameters(1.1 * vector, other.parameters())
    with pytest.raises(ModelError, match=r"LowRankLinear.* not orthonormal any more .*averages=\[...\]"):
        other(X)
    other.load_state_dict(copy.deepcopy(oialr.module).state_dict() if made != "averaged" else other.state_dict())
    other(X)


@pytest.mark.parametrize("after", [0, 4])
@pytest.mark.parametrize("keep", [list, lambda p: {"decayed": tuple(p)}, lambda p: dict.fromkeys(p, 1)])
def test_lists_of_parameters_made_before_a_change_are_named(keep: Any, after: int) -> None:
    model = model_of(20, 12)
    oialr = controller(model)
    train(oialr, after)
    kept = keep(model.parameters())
    shape = (20, 16) if after == 0 else (16, 16)
    with pytest.warns(
        UserWarning, match=re.escape(f"2 parameters that OIALR has replaced, the first of shape {shape}")
    ):
        train(oialr, 4 if after == 0 else 2)
    del kept
    train(oialr, 4)
    assert oialr.r == {"0": 8, "2": 6}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("micro", [2, 3])
def test_gradients_accumulated_across_a_change_of_basis_follow(momentum: float, micro: int) -> None:
    """oialr.step() after every part of a batch: nothing is cut, so the loop goes on as without it."""
    losses: list[list[float]] = []
    for frequency in (1, 1000):
        model = model_of(16, 16).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        config = OIALRConfig(delay=1, frequency=frequency, rule=RelativeCutoff(1e-12), layer_share_step=1.0)
        oialr = OIALR(model, optimizer, config)
        losses.append([])
        for _ in range(4):
            for x, y in zip(X.double().chunk(micro), Y.chunk(micro), strict=True):
                loss = F.cross_entropy(oialr.model(x), y) / micro
                loss.backward()
                losses[-1].append(float(loss.detach()))
                oialr.step()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-9, atol=0)


def test_what_is_left_to_do_is_said_where_nothing_can_be_converted() -> None:
    model = model_of(20, 12)
    rest = torch.optim.AdamW([*model[4].parameters(), model[0].bias])
    with pytest.raises(ModelError, match=r"0 \(its weight is not in the optimizer\); 2 \(its"):
        OIALR(model, rest)
    oialr = controller(model)
    train(oialr, 4)
    with pytest.raises(ModelError, match=r"weight to assign to"):
        prune.l1_unstructured(model[0], "weight", amount=0.5)


def test_a_model_without_values_is_named() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 20), nn.Linear(20, 6))
    oialr = controller(model, delay=1)
    with pytest.raises(ModelError, match="weights of 0 are on the meta device and have no values"):
        oialr.step()


def test_a_failed_conversion_leaves_a_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(20, 24, 12)
    oialr = controller(model)
    train(oialr, 2)
    plain, count = oialr._basis.convert, iter(range(9))

    def fail(*arguments: Tensor) -> None:
        if next(count) == 2:
            raise torch.cuda.OutOfMemoryError("made up")
        plain(*arguments)

    monkeypatch.setattr(oialr._basis, "convert", fail)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        train(oialr, 1)
    assert len(oialr.r) == 2
    monkeypatch.undo()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(X), model(X))
    train(oialr, 1)
    assert len(oialr.r) == 3
