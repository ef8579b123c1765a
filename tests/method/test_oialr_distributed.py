"""The controller on 2 and 4 processes: same losses, same r, equal replicas, little traffic, clear errors."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from support.spawn import spawn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hpc_oialr import OIALR, Energy, OIALRConfig, RankLimits, muon_adamw
from hpc_oialr.distributed import World
from hpc_oialr.errors import NonFiniteError, ReplicaMismatchError

STEPS = 100


def join(size: int) -> None:
    """Make the process group, as a user's own loop does."""
    torch.set_num_threads(1)
    if size > 1:
        World.from_environment(device="cpu")


def network(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 24), nn.Linear(24, 4)]
    return nn.Sequential(*layers).to(dtype)


def config(**options: Any) -> OIALRConfig:
    limits = RankLimits(max_drop=0.2, at_conversion=0.75, round_to=1)
    settings: dict[str, Any] = {
        "delay": 30,
        "frequency": 20,
        "rule": Energy(0.8),
        "limits": limits,
        "layer_share_step": 0.5,
    }
    return OIALRConfig(**settings | options)


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "MuonAdamW":
        return muon_adamw(model, lr=0.01)
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


def losses_of(rank: int, size: int, name: str, dtype: torch.dtype) -> tuple[list[float], dict[str, int]]:
    """Train on this process's share of the same global batches; global losses and r."""
    join(size)
    model = network(dtype)
    oialr = OIALR(model, optimizer_of(name, model), config())
    generator, losses, wrapper = torch.Generator().manual_seed(1), [], oialr.model
    for _ in range(STEPS):
        x, y = (
            torch.randn(16, 12, generator=generator).to(dtype),
            torch.randint(0, 4, (16,), generator=generator),
        )
        x, y = x.chunk(size)[rank], y.chunk(size)[rank]
        loss = nn.functional.cross_entropy(oialr.model(x), y)
        loss.backward()
        oialr.optimizer.step()
        oialr.optimizer.zero_grad()
        oialr.step()
        total = oialr.engine.world.all_reduce(loss.detach().double()) / size
        losses.append(float(total))
        assert oialr.model is wrapper
    assert isinstance(oialr.model, DistributedDataParallel) == (size > 1)
    return losses, oialr.r


@pytest.mark.parametrize(("name", "size"), [("AdamW", 2), pytest.param("MuonAdamW", 4, marks=pytest.mark.long)])
def test_equal_to_one_process(name: str, size: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-3)):
        alone, r_alone = losses_of(0, 1, name, dtype)
        together = spawn(functools.partial(losses_of, name=name, dtype=dtype), size)
        for losses, r in together:
            assert r == r_alone
            assert losses == pytest.approx(alone, rel=tolerance)
            assert losses == together[0][0]


def _rebuild_only_on_new_shapes(rank: int, size: int) -> tuple[list[bool], int]:
    join(size)
    model = network(torch.float32)
    limits = RankLimits(max_drop=0.2, at_conversion=0.5, round_to=1)
    plan = config(delay=1, frequency=1, limits=limits, importance="weights")
    oialr = OIALR(model, torch.optim.SGD(model.parameters(), lr=0.0), plan)
    rebuilt, sent = [], 0
    for _ in range(12):
        wrapper, before = oialr.model, oialr.model.reducer
        report = oialr.step()
        assert report is not None
        assert oialr.model is wrapper
        rebuilt.append((wrapper.reducer is not before) == report.reshaped)
        if report.kind == "update":
            expected = sum(2 * u.r_before**2 + u.r_before + 4 for u in report.layers) * 4 * (size - 1)
            assert report.bytes_sent == expected
            sent += 1
    return rebuilt, sent


def test_nothing_is_rebuilt_unless_a_shape_changed() -> None:
    for rebuilt, updates in spawn(_rebuild_only_on_new_shapes, 2):
        assert all(rebuilt)
        assert updates == 11


def _mismatch(rank: int, size: int) -> str:
    join(size)
    model = network(torch.float32)
    oialr = OIALR(
        model, torch.optim.SGD(model.parameters(), lr=0.0), config(delay=1, frequency=1, layer_share_step=1.0)
    )
    oialr.step()
    if rank == 1:
        with torch.no_grad():
            model[2].U[0, 0] += 1e-3
    with pytest.raises(ReplicaMismatchError) as caught:
        oialr.step()
    return str(caught.value)


def test_a_changed_replica_is_named() -> None:
    for text in spawn(_mismatch, 2):
        assert "ranks hold different bits: 2 (rank" in text


def _failed_svd(rank: int, size: int) -> str:
    join(size)
    model = network(torch.float32)
    oialr = OIALR(model, torch.optim.SGD(model.parameters(), lr=0.0), config(delay=1))
    if rank == 0:

        def never(*_: Any, **__: Any) -> None:
            raise torch.linalg.LinAlgError("did not converge")

        torch.linalg.svd = never  # type: ignore[assignment]
    with pytest.raises(NonFiniteError) as caught:
        oialr.step()
    return str(caught.value)


def test_a_failed_svd_stops_every_process() -> None:
    first, second = spawn(_failed_svd, 2)
    assert "no SVD of" in first
    assert "no SVD on the rank that had to do it" in second


def _accumulate(rank: int, size: int) -> float:
    """Two half batches under no_sync equal one whole batch."""
    join(size)
    results = []
    for parts in (1, 2):
        model = network(torch.float64)
        oialr = OIALR(model, torch.optim.SGD(model.parameters(), lr=0.1), config(delay=2))
        generator = torch.Generator().manual_seed(rank)
        for _ in range(4):
            x = torch.randn(8, 12, generator=generator).double()
            for i, piece in enumerate(x.chunk(parts)):
                if i < parts - 1:
                    with oialr.no_sync():
                        (oialr.model(piece).square().mean() / parts).backward()
                else:
                    (oialr.model(piece).square().mean() / parts).backward()
            oialr.optimizer.step()
            oialr.optimizer.zero_grad()
            oialr.step()
        results.append(copy.deepcopy(model.state_dict()))
    return max(float((results[0][k] - results[1][k]).abs().max()) for k in results[0])


def test_accumulation() -> None:
    assert max(spawn(_accumulate, 2)) < 1e-13


def _watch(rank: int, size: int) -> tuple[dict[str, Any], list[str], int]:
    join(size)
    model = network(torch.float32)
    options = {"delay": 4, "stability_frequency": 2, "stability_threshold": 0.9}
    oialr = OIALR(model, torch.optim.SGD(model.parameters(), lr=0.0), config(**options))
    kept = 0
    for t in range(6):
        oialr.step()
        if t == 2:
            kept = len(oialr._tracker._bases)
            tensors = oialr.tensor_state()
    return oialr.state_dict(), sorted(tensors), kept


def test_bases_for_stability_live_on_one_process_each() -> None:
    (state, names, kept), (other, same, kept_there) = spawn(_watch, 2)
    assert state == other
    assert names == same
    assert len(names) == 9
    assert kept + kept_there == 3
    assert state["r"] == {"0": 9, "2": 18, "4": 18}
