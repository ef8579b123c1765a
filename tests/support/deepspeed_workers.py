"""A small model under the OIALR controller, as processes with DeepSpeed or one without it train it."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits
from hpc_oialr.distributed import World
from hpc_oialr.engines import DeepSpeedEngine, Engine, SingleEngine
from hpc_oialr.engines.zero_live import MASTER
from hpc_oialr.lowrank.base import whole_shape

STEPS, CONVERTED, CUTS = 13, 4, (7, 10)  # and an update at 13 that cuts nothing
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


class Net(nn.Module):
    """An embedding, attention and linear layers, so that all kinds of parameters are there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16)
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mix = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        return self.head((x + self.mix(x)).mean(1))


class Run:
    """One process's part of a training run."""

    def __init__(self, engine: Engine, precision: str = "fp32", optimizer: str = "AdamW", **settings: Any) -> None:
        self.engine, self.precision = engine, precision
        self.module = Net()
        groups = [
            {"params": [p for p in self.module.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in self.module.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        options: dict[str, Any] = {"lr": 3e-3} if optimizer == "AdamW" else {"lr": 0.05, "momentum": 0.9}
        self.optimizer = getattr(torch.optim, optimizer)(groups, **options)
        defaults: dict[str, Any] = {
            "delay": CONVERTED,
            "frequency": 3,
            "rule": FixedFraction(0.4),
            "limits": RankLimits(at_conversion=0.75, max_drop=0.3, round_to=1),
            "layer_share_step": 1.0,
            "importance": "weights",
        }
        config = OIALRConfig(**defaults | settings)
        self.oialr = OIALR(self.module, self.optimizer, config, engine=engine)
        self.generator, self.losses = torch.Generator().manual_seed(1), []

    def learn(self, parts: int = 1, clip: float | None = None) -> None:
        """One optimizer step on this process's share of a global batch, in ``parts`` backward passes."""
        world = self.engine.world
        ids = torch.randint(0, 11, (16, 5), generator=self.generator)
        labels = ids.sum(1) % 4
        shares = [t.chunk(world.size)[world.rank].chunk(parts) for t in (ids, labels)]
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.99
        total = torch.zeros((), dtype=torch.float64)
        for i, (x, y) in enumerate(zip(*shares, strict=True)):
            with nullcontext() if i == parts - 1 else self.oialr.no_sync():
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                    loss = nn.functional.cross_entropy(self.oialr.model(x), y) / parts
                self.engine.backward(loss, NO_SCALER)
            total += loss.detach().double()
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.engine.update(self.optimizer, NO_SCALER, trained, clip)
        self.losses.append(float(world.all_reduce(total)) / world.size)

    def train(self, steps: int = STEPS) -> Run:
        """Some steps in two backward passes each, with clipping."""
        for _ in range(steps):
            self.learn(2, clip=0.7)
            self.oialr.step()
        return self


def alone(precision: str = "fp32", optimizer: str = "AdamW") -> Run:
    """The same run on one process."""
    return Run(SingleEngine(), precision, optimizer).train()


def zero(stage: int, precision: str = "fp32", **more: Any) -> DeepSpeedEngine:
    """The engine of all processes."""
    given = {"zero_optimization": {"stage": stage, **more}, "bf16": {"enabled": "auto"}}
    return DeepSpeedEngine(World.current(), given, precision=precision)


def whole_state(engine: DeepSpeedEngine) -> dict[Any, dict[str, Any]]:
    """Everything that is trained, gathered: of the live engine, and of parameters that wait for the next."""
    live, state = engine.running(), {}
    for p in engine._trained():
        part = live.new[p] if p in live.new else live.part(p)
        tensors = {key: part.whole(key, p, engine.world) for key in part.values}
        state[p] = tensors | {"step": float(part.scalars["step"])}
    return state


def same(before: dict[Any, dict[str, Any]], after: dict[Any, dict[str, Any]]) -> bool:
    """Whether two states have the same bits."""
    assert list(before) == list(after)
    return all(
        torch.equal(torch.as_tensor(before[p][key]), torch.as_tensor(after[p][key]))
        for p in before
        for key in (MASTER, "exp_avg", "exp_avg_sq", "step")
    )


def trained(stage: int, precision: str = "fp32", optimizer: str = "AdamW") -> dict[str, Any]:
    """Losses and r of a run, when its engine was made, and whether rebuilds kept all state."""
    engine, kept = zero(stage, precision), []
    run = Run(engine, precision, optimizer)
    rewrap = engine.rewrap

    def watched(module: nn.Module) -> nn.Module:
        before = whole_state(engine)
        wrapped = rewrap(module)
        kept.append(same(before, whole_state(engine)))
        return wrapped

    if optimizer == "AdamW":
        engine.rewrap = watched  # type: ignore[method-assign]
    made = []
    for _ in range(STEPS):
        before = engine.builds
        run.train(1)
        if engine.builds > before:
            made.append(len(run.losses))
    assert not run.optimizer.state, "between changes the given optimizer holds nothing"
    return {"losses": run.losses, "r": run.oialr.r, "made": made, "kept": kept}


def trained_with_copies() -> list[float]:
    """Losses under stage 3 that holds fp32 values and parameters twice, as DeepSpeed makes them."""
    with mock.patch("hpc_oialr.engines.zero_live._share_masters"):
        losses: list[float] = trained(3)["losses"]
    return losses


def held_bytes_a_number(stage: int) -> float:
    """What the engine holds after a dense step, over the numbers that the module has."""
    run = Run(zero(stage)).train(2)
    storages = [tensor.untyped_storage() for tensor in run.engine.extra_tensors()]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    return held / sum(whole_shape(p).numel() for p in run.module.parameters())


def evaluated(stage: int) -> list[float]:
    """Outputs of the module itself, called without the wrapper, before and after steps."""
    run = Run(zero(stage))
    ids, outputs = torch.arange(10).view(2, 5), []
    for _ in range(2):
        run.train(2)
        with torch.no_grad():
            outputs += run.module.eval()(ids).flatten().tolist()
        run.module.train()
    return outputs


def bytes_after(stage: int, counts: list[int]) -> list[int]:
    """Bytes of all tensors of this process after so many rebuilds without a change."""
    engine = zero(stage)
    run, sizes = Run(engine).train(CONVERTED + 1), []
    first = engine.builds
    while engine.builds - first < max(counts):
        live = engine.running()
        core = run.oialr.targets[0].trained
        live.new[core] = live.part(core).kept()
        engine.rewrap(run.module)
        del live
        run.learn()
        if engine.builds - first in counts:
            sizes.append(tensor_bytes())
    return sizes


def tensor_bytes() -> int:
    """Bytes of all storages that any tensor of this process refers to."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
