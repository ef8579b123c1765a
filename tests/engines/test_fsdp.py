"""FSDP2 with layers that change: the same numbers as on one process, in a share of the memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from support.spawn import spawn
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import cross_entropy

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits, low_rank_layers, muon_adamw
from hpc_oialr.distributed import World
from hpc_oialr.engines import FSDP, DDPEngine, FSDPEngine, Single
from hpc_oialr.engines.fsdp import blocks
from hpc_oialr.errors import ConfigError, ModelError
from hpc_oialr.lowrank.layout import whole
from hpc_oialr.method.report import LayerUpdate
from hpc_oialr.record.memory import resident_bytes

STEPS, BATCH = 12, 24
OFF = torch.amp.GradScaler("cpu", enabled=False)


class Attention(nn.Module):
    """A block with packed projections, whose parameter moves into a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(24, 3, batch_first=True), nn.LayerNorm(24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x), self.norm(x), self.norm(x), need_weights=False)[0]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Net(nn.Module):
    """Widths that do not divide by three, a convolution, attention, a last layer that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(5, 24, 3, padding=1)
        self.layers = nn.ModuleList([Attention(), MLP(), MLP()])
        self.head = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mT
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def settings(**over: Any) -> OIALRConfig:
    common: dict[str, Any] = {
        "delay": 4,
        "frequency": 3,
        "rule": FixedFraction(0.25),
        "limits": RankLimits(at_conversion=0.75, max_drop=0.3, round_to=1),
        "layer_share_step": 1.0,
        "stability_frequency": 2,
    }
    return OIALRConfig(**common | over)


def train(
    rank: int, size: int, optimizer_name: str, dtype: torch.dtype, replicas: int = 1, frozen: Any = "sharded"
) -> dict[str, Any]:
    """Losses by step, r, stabilities; the engine is FSDP for more than one process."""
    world = World.from_environment(device="cpu", timeout_s=60) if size > 1 else World.single("cpu")
    engine = FSDP(replicas=replicas, frozen=frozen).build(world, "fp32")
    torch.manual_seed(0)
    net = Net().to(dtype)
    engine.place(net)
    adamw = optimizer_name == "adamw"
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2) if adamw else muon_adamw(net, lr=0.02)
    oialr = OIALR(net, optimizer, settings(), engine=engine)
    generator = torch.Generator().manual_seed(1)
    losses, reports = [], []
    share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    for _ in range(STEPS):
        x = torch.randn(BATCH, 5, 6, generator=generator, dtype=dtype)[share]
        y = torch.randint(0, 7, (BATCH,), generator=generator)[share]
        for part in range(2):
            half = slice(part, None, 2)
            with oialr.no_sync() if part == 0 else torch.enable_grad():
                loss = cross_entropy(oialr.model(x[half]), y[half]) / 2
                engine.backward(loss, OFF)
            losses.append(float(world.all_reduce(loss.detach().double()) / size))
        engine.update(optimizer, OFF, [p for p in net.parameters() if p.requires_grad], 1.0)
        reports.append(oialr.step())
    stored = sorted({type(p).__name__ for p in [*net.parameters(), *states(optimizer)]})
    found = {
        "losses": losses,
        "r": oialr.r,
        "changes": [[changes(u) for u in r.layers] for r in reports if r],
        "errors": [u.orthogonality_error_U for r in reports if r for u in r.layers],
        "stored": stored,
        "bytes": resident_bytes(net, optimizer),
        "whole_bases": sum(
            p.nbytes for layer in low_rank_layers(net).values() for p in (layer.U, layer.Vh) if type(p) is nn.Parameter
        ),
    }
    world.close()
    return found


def changes(update: LayerUpdate) -> list[float]:
    """Since the last basis, measured in blocks; None, where there was none, as NaN."""
    measured = (update.stability, update.subspace_angle_U, update.subspace_angle_Vh, update.r_factor_distance)
    return [math.nan if figure is None else figure for figure in measured]


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.dim()]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {name: train(0, 1, name, torch.float64) for name in ("adamw", "muon")}


@pytest.mark.parametrize(
    ("size", "name", "replicas"), [pytest.param(2, "muon", 1, marks=pytest.mark.long), (3, "adamw", 1), (4, "muon", 2)]
)
def test_same_as_one_process(alone, size, name, replicas):
    """Through conversion and cuts, uneven shards, accumulation, clipping; HSDP with four processes."""
    expected = alone[name]
    for found in spawn(train, size, name, torch.float64, replicas):
        assert found["r"] == expected["r"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-9)
        for ours, theirs in zip(found["changes"], expected["changes"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
        assert max(found["errors"]) < 1e-12
        # Whole moments or factors would be plain tensors.
        assert found["stored"] == ["DTensor"] or found["stored"] == ["DTensor", "Parameter"]
        # Blocks are padded: two rows a process where r is 5 and processes are three.
        padding = 1.45 if size == 3 else 1.15
        assert found["bytes"] < expected["bytes"] / (size // replicas) * padding


def test_whole_bases(alone):
    """The same losses with bases on every rank, which are all that takes more memory."""
    expected = alone["adamw"]
    for found in spawn(train, 3, "adamw", torch.float64, 1, "replicated"):
        assert found["r"] == expected["r"]
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-9)
        for ours, theirs in zip(found["changes"], expected["changes"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
        assert max(found["errors"]) < 1e-12
        assert found["whole_bases"] == expected["whole_bases"] > 0
        rest, all_of_it = (each["bytes"] - each["whole_bases"] for each in (found, expected))
        assert rest < all_of_it / 3 * 1.45


def losses_of(oialr: OIALR, engine: FSDPEngine, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Of steps on the same samples on every rank."""
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        loss = cross_entropy(oialr.model(torch.randn(8, 5, 6)).float(), torch.randint(0, 7, (8,)))
        engine.backward(loss, OFF)
        engine.update(optimizer, OFF, [], None)
        oialr.step()
        losses.append(float(loss.detach()))
    return losses


def in_bf16(rank: int, size: int) -> dict[str, Any]:
    """Losses, copies of bases and merged weights, by where bases are."""
    world, found = World.from_environment(device="cpu", timeout_s=60), {}
    for frozen in ("sharded", "replicated"):
        torch.manual_seed(0)
        engine, net = FSDP(frozen=frozen).build(world, "bf16-params"), Net()
        engine.place(net)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        oialr = OIALR(net, optimizer, settings(delay=2, frequency=2, stability_frequency=None), engine=engine)
        losses = losses_of(oialr, engine, optimizer, 13)
        layers = low_rank_layers(net).values()
        found[frozen] = {
            "losses": losses,
            "copies": {t.dtype for x in layers if x.autocast_copies for t in x.autocast_copies.tensors},
            "merged": float(sum(whole(layer.weight.detach()).double().square().sum() for layer in layers)),
        }
    world.close()
    return found


def test_whole_bases_are_cast_once_and_give_the_same_bits() -> None:
    for found in spawn(in_bf16, 2):
        sharded, replicated = found["sharded"], found["replicated"]
        assert replicated["losses"] == sharded["losses"]
        assert (sharded["copies"], replicated["copies"]) == (set(), {torch.bfloat16})
        assert replicated["merged"] == pytest.approx(sharded["merged"], rel=1e-6)


def reshaping(rank: int, size: int) -> dict[str, Any]:
    world = World.from_environment(device="cpu", timeout_s=60)
    engine = FSDP().build(world, "fp32")
    net = Net()
    engine.place(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    oialr = OIALR(net, optimizer, settings(delay=2, frequency=2), engine=engine)
    before = {}
    kept, turned = [], []
    for _ in range(12):
        engine.backward(oialr.model(torch.randn(4, 5, 6)).sum(), OFF)
        engine.update(optimizer, OFF, [], None)
        report = oialr.step()
        now = dict(net.named_parameters())
        if report is not None and report.kind == "update":
            same_r = [u.name for u in report.layers if not u.cut_values]
            kept.append(all(now[f"{name}.S"] is before[f"{name}.S"] for name in same_r))
            turned.append(len(same_r))
        before = now
    layer = net.layers[1].inner[1]
    placements = {name: p.placements for name, p in layer.named_parameters()}
    grads = {name: p.requires_grad for name, p in layer.named_parameters()}
    world.close()
    return {"kept": kept, "turned": turned, "placements": placements, "grads": grads}


def test_only_layers_whose_r_changed_are_sharded_anew():
    found = spawn(reshaping, 2)[0]
    assert all(found["kept"])
    assert found["turned"][-1] == 7  # all of them: r has reached its target
    assert found["placements"]["U"] == (Shard(0),)
    assert found["placements"]["Vh"] == (Shard(1),)
    assert found["grads"] == {"U": False, "S": True, "Vh": False, "bias": True}


def precision(rank: int, size: int) -> dict[str, Any]:
    world = World.from_environment(device="cpu", timeout_s=60)
    engine = FSDP().build(world, "bf16")
    seen: list[torch.dtype] = []
    net = Net()
    net.layers[1].inner[1].register_forward_hook(lambda layer, *_: seen.extend(p.dtype for p in layer.parameters()))
    engine.place(net)
    optimizer = muon_adamw(net, lr=0.02)
    oialr = OIALR(net, optimizer, settings(delay=2, frequency=2), engine=engine)
    losses = losses_of(oialr, engine, optimizer, 10)
    world.close()
    return {"seen": set(seen), "stored": {p.dtype for p in net.parameters()}, "losses": losses}


def test_bf16_travels_fp32_stays():
    found = spawn(precision, 2)[0]
    assert found["seen"] == {torch.bfloat16}
    assert found["stored"] == {torch.float32}
    assert all(loss < 10 for loss in found["losses"])


def averaging(rank: int, size: int) -> str:
    world = World.from_environment(device="cpu", timeout_s=60)
    engine, net = FSDP().build(world, "fp32"), Net()
    average = torch.optim.swa_utils.AveragedModel(net)
    engine.place(net)
    with pytest.raises(ModelError) as caught:
        OIALR(net, torch.optim.SGD(net.parameters(), lr=1), engine=engine, averages=[average])
    world.close()
    return str(caught.value)


def adopted(rank: int, size: int) -> dict[str, Any]:
    """Three lines in a loop whose model its user has sharded."""
    world = World.from_environment(device="cpu", timeout_s=60)
    torch.manual_seed(0)
    net = Net()
    for block in [*net.layers, net] if size > 1 else []:
        fully_shard(block)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    oialr = OIALR(net, optimizer, settings(delay=2, frequency=2))
    losses = []
    for step in range(8):
        torch.manual_seed(step)
        loss = cross_entropy(oialr.model(torch.randn(8, 5, 6)), torch.randint(0, 7, (8,)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        oialr.step()
        losses.append(float(loss.detach()))
    found = {"engine": type(oialr.engine).__name__, "losses": losses, "r": oialr.r}
    world.close()
    return found


def test_a_model_its_user_has_sharded():
    sharded, (alone,) = spawn(adopted, 2)[0], spawn(adopted, 1)
    assert sharded["engine"] == "FSDPEngine"
    assert sharded["r"]
    assert sharded["r"] == alone["r"]
    assert sharded["losses"] == pytest.approx(alone["losses"], rel=1e-4)


def test_averages_must_be_whole():
    message = spawn(averaging, 2)[0]
    assert "1 running averages were given, but the engine splits each matrix over ranks" in message


def test_settings():
    with pytest.raises(ConfigError, match=r"replicas is 0; must be at least 1"):
        FSDP(replicas=0)
    with pytest.raises(ConfigError, match=r"replicas is 3; must divide the 4 ranks"):
        FSDP(replicas=3).build(World(0, 4), "fp32")
    with pytest.raises(ConfigError, match=r"engine is 'Single'; is for one process, and 2 were started"):
        Single().build(World(0, 2), "fp32")
    assert not isinstance(FSDP().build(World.single("cpu"), "fp32"), (FSDPEngine, DDPEngine))


def test_blocks_are_the_outermost_lists():
    net = Net()
    assert blocks(net) == [*net.layers]
    inner = nn.Sequential(nn.Linear(2, 2))
    assert blocks(nn.Sequential(nn.Linear(2, 2), inner)) == [inner]
    assert not isinstance(next(net.parameters()), DTensor)
