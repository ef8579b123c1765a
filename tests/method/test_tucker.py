"""Convolutions in Tucker form under the controller: against plain einsums, resumed, on two processes, and refused."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.spawn import spawn
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_oialr import OIALR, Budget, Energy, OIALRConfig, RankLimits, fold, match_structure, merge, mlsvd, muon_adamw
from hpc_oialr.distributed import World
from hpc_oialr.errors import ConfigError
from hpc_oialr.lowrank import Selection, convert, low_rank_layers
from hpc_oialr.lowrank.tucker import TuckerConv
from hpc_oialr.method.engine import SingleEngine
from hpc_oialr.method.report import UpdateReport

DELAY, FREQUENCY, STEPS = 3, 3, 14
LIMITS = RankLimits(max_drop=0.3, round_to=1, at_conversion=0.9)
Make = Callable[[nn.Module], torch.optim.Optimizer]


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Tanh()]
    return nn.Sequential(*layers, nn.Conv2d(12, 8, 1), nn.Tanh(), nn.Flatten(), nn.Linear(72, 4)).double()


def config(**options: Any) -> OIALRConfig:
    given: dict[str, Any] = {"delay": DELAY, "frequency": FREQUENCY, "rule": Energy(0.9), "limits": LIMITS}
    return OIALRConfig(**given | {"layer_share_step": 1.0, "conv": "tucker"} | options)


def batches(start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    teacher = torch.randn(108, 4, generator=generator).double()
    for step in range(STEPS):
        x = torch.randn(16, 3, 6, 6, generator=generator).double()
        if step >= start:
            yield x, (x.flatten(1) @ teacher).argmax(1)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    return muon_adamw(model, lr=0.02)


def one_step(oialr: OIALR, x: Tensor, y: Tensor) -> tuple[Tensor, UpdateReport | None]:
    loss = F.cross_entropy(oialr.model(x), y)
    oialr.optimizer.zero_grad()
    loss.backward()
    oialr.optimizer.step()
    return loss.detach(), oialr.step()


class PlainConv(nn.Module):
    """``sum_ab U[o, a] S[a, b, h, w] V[i, b]`` in place of the weight of ``dense``; the state moves by einsum."""

    def __init__(self, dense: nn.Conv2d, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.stride, self.padding, self.bias, self.optimizer = dense.stride, dense.padding, dense.bias, optimizer
        self.U, self.V = (torch.eye(n).double() for n in dense.weight.shape[:2])
        self.S = dense.weight
        self.turn(*(LIMITS.initial(len(s)) for s, _ in self.modes()))

    def modes(self) -> list[tuple[Tensor, Tensor]]:
        S = self.S.detach()
        found = [torch.linalg.svd(A.flatten(1), full_matrices=False) for A in (S, S.transpose(0, 1))]
        return [(s, U) for U, s, _ in found]

    def turn(self, r_out: int, r_in: int) -> None:
        (_, P), (_, Q) = self.modes()
        P, Q, old = P[:, :r_out], Q[:, :r_in], self.S
        move = functools.partial(torch.einsum, "oihw,oa,ib->abhw")
        self.U, self.V, self.S = self.U @ P, self.V @ Q, nn.Parameter(move(old.detach(), P, Q))
        group = self.optimizer.param_groups[0]
        group["params"] = [self.S if p is old else p for p in group["params"]]
        state = self.optimizer.state.pop(old)
        moved = {"exp_avg": move(state["exp_avg"], P, Q), "exp_avg_sq": move(state["exp_avg_sq"], P**2, Q**2)}
        self.optimizer.state[self.S] = state | moved

    def update(self) -> None:
        shapes = [(8, 27), (3, 72)] if len(self.U) == 8 else [(12, 72), (8, 108)]
        kept = []
        for (s, _), (m, n) in zip(self.modes(), shapes, strict=True):
            kept.append(LIMITS.apply(Energy(0.9).choose(s, m, n), len(s), min(m, n)))
        self.turn(*kept)

    def forward(self, x: Tensor) -> Tensor:
        W = torch.einsum("oa,abhw,ib->oihw", self.U, self.S, self.V)
        return F.conv2d(x, W, self.bias, self.stride, self.padding)


def test_the_same_run_as_by_plain_einsums() -> None:
    """Conversion, cuts and Adam's moments of every step; the kernel of extent one stays dense."""
    model, plain = network(), network()
    settings = config(importance="weights", core_lr_scale=1.0, selection=Selection(exclude=("4",)))
    oialr, optimizer, sizes = OIALR(model, adamw(model), settings), adamw(plain), []
    for t, (x, y) in enumerate(batches(), start=1):
        loss, report = one_step(oialr, x, y)
        expected = F.cross_entropy(plain(x), y)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-9), t
        convs = [plain[i] for i in (0, 2)]
        if t == DELAY:
            for i in (0, 2):
                plain[i] = PlainConv(plain[i], optimizer)
        for conv in convs if t > DELAY and (t - DELAY) % FREQUENCY == 0 else ():
            conv.update()
        if t >= DELAY:
            layers = low_rank_layers(model).values()
            assert [layer.inner for layer in layers] == [plain[i].S.shape[:2] for i in (0, 2)]
        if report is not None:
            assert report.reshaped
            sizes.append([(each.r, each.input_channels.r) for each in report.layers])
    assert len(sizes) == 4
    assert sizes[0][1] > sizes[-1][1]


@pytest.mark.parametrize("make", [adamw, muon])
def test_resumed_from_any_phase_folded_and_merged(make: Make) -> None:
    """Into a dense model, and into one whose convolutions are low-rank and flattened."""
    model = network()
    oialr = OIALR(model, make(model), config())
    saved = {}
    for t, (x, y) in enumerate(batches(), start=1):
        one_step(oialr, x, y)
        if t in (2, 5, 10):
            state = model.state_dict(), oialr.optimizer.state_dict(), oialr.tensor_state()
            saved[t] = json.loads(json.dumps(oialr.state_dict())), *copy.deepcopy(state)
    assert [type(layer).__name__ for layer in low_rank_layers(model).values()] == [
        "TuckerConv2d",
        "TuckerConv2d",
        "LowRankConv2d",
    ]
    for t, (count, values, moments, tensors) in saved.items():
        for form in ("tucker", "flattened"):
            other = network()
            second = OIALR(other, make(other), config(conv=form, delay=1) if form == "flattened" else config())
            if form == "flattened":
                one_step(second, *next(batches()))
                second.config.conv, second.config.delay = "tucker", DELAY
            second.load_state_dict(count, tensors)
            other.load_state_dict(values)
            second.optimizer.load_state_dict(copy.deepcopy(moments))
            for x, y in batches(start=t):
                one_step(second, x, y)
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)), (
                t,
                form,
            )
    loaded = network()
    assert match_structure(loaded, model.state_dict()) == ["0", "2", "4"]
    loaded.load_state_dict(model.state_dict())
    dense = network()
    dense.load_state_dict(merge(model).state_dict(), strict=True)
    for each in (loaded, dense, fold(model)):
        torch.testing.assert_close(each(x), model(x), rtol=1e-10, atol=1e-12)


def test_a_cut_at_the_conversion_is_the_truncated_multilinear_svd() -> None:
    model = network()
    weight = model[2].weight.detach().clone()
    convert(model, Selection(include=("2",)), fraction=0.5, conv="tucker")
    layer = model[2]
    assert isinstance(layer, TuckerConv)
    assert layer.inner == (6, 4)
    expected = mlsvd(weight.flatten(2), (6, 4, 9)).dense()
    torch.testing.assert_close(layer.weight.flatten(2), expected, rtol=0, atol=1e-12)


def _losses(rank: int, size: int) -> tuple[list[float], list[int]]:
    torch.set_num_threads(1)
    if size > 1:
        World.from_environment(device="cpu")
    model = network()
    oialr, losses, sent = OIALR(model, muon(model), config()), [], []
    for x, y in batches():
        loss, report = one_step(oialr, x.chunk(size)[rank], y.chunk(size)[rank])
        losses.append(float(oialr.engine.world.all_reduce(loss) / size))
        sent += [] if report is None else [report.bytes_sent]
    return losses, sent


def test_two_processes_equal_one() -> None:
    alone, _ = _losses(0, 1)
    for losses, sent in spawn(_losses, 2):
        assert losses == pytest.approx(alone, rel=1e-9)
        # U, Vh and the values of both modes; the matrix of the kernel of extent one; 8 bytes each.
        kernels = 8 * 7 + 8 + 3 * 3 + 3 + 12 * 11 + 12 + 8 * 7 + 8
        assert sent[0] == 8 * (kernels + 7 * (8 + 12) + 8 + 8)


class ShardingEngine(SingleEngine):
    whole_factors = False


def test_what_tucker_layers_cannot_do_is_refused() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"rule": Budget(parameters=0.1)}, "conv is 'tucker'; has two r a layer, which Budget cannot choose"),
        ({"train": "factors"}, "conv is 'tucker'; needs bases that are frozen and do not grow"),
        ({"grow": 0.1}, "conv is 'tucker'; needs bases that are frozen and do not grow"),
        ({"importance": "inputs"}, "conv is 'tucker'; cuts convolutions by their weights, not by inputs"),
    ]
    for options, text in refused:
        with pytest.raises(ConfigError, match=text):
            config(**options)
    model = network()
    with pytest.raises(ConfigError, match="keeps factors whole on every rank, and ShardingEngine shards them"):
        OIALR(model, adamw(model), config(), engine=ShardingEngine())
