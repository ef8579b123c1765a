"""A run of a user's own with anything that is supported in it, drawn from a seed, and the ways to interrupt it."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from support.small_training import Accelerated, Chained, batch, settings
from support.supported import CLOSURE, OPTIONS, find_class, make_optimizer, missing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel

from hpc_oialr import OIALR, FixedFraction
from hpc_oialr.optim.stack import OptimizerStack
from hpc_oialr.optim.state_kinds import OPTIMIZERS

STEPS = 12
NAMES = sorted(name for name in OPTIMIZERS if not missing(name))
# ZeroRedundancyOptimizer's own limits: modes kept in groups, state of the whole, groups for cores.
NOT_PARTITIONED = ("hpc_oialr.MuonAdamW", "pytorch_optimizer.MADGRAD")
COPYABLE = ("torch", "hpc_oialr", "schedulefree", "transformers", "timm")
# Structure before the optimizer.
ORDERS = (
    ("model", "optimizer", "oialr"),
    ("model", "oialr", "optimizer"),
    ("oialr", "model", "optimizer"),
    ("oialr", "optimizer", "model"),
)
DDP_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"gradient_as_bucket_view": True},
    {"bucket_cap_mb": 1e-3, "gradient_as_bucket_view": True},
)


@dataclass(frozen=True)
class Stop:
    """An interruption.

    Attributes
    ----------
    at
        Steps done.
    within
        Whether the next step's ``optimizer.step()`` is done too, but not its ``oialr.step()``.
    way
        "fresh": a state dict of everything into a new run; "warm": into one that has trained on by itself; "back": into
        the same one after it has gone on; or "deepcopy", "pickle".
    order
        In which the parts are loaded.
    warm
        Steps of what it is loaded into.
    outer
        Whether the model is saved and loaded through its wrapper.
    """

    at: int
    within: bool
    way: str
    order: tuple[str, ...]
    warm: int
    outer: bool


@dataclass(frozen=True)
class Plan:
    """A run of 12 steps, and where and how it is disturbed."""

    seed: int
    name: str
    model: str
    wrapper: str
    options: dict[str, Any] | None
    config: dict[str, Any]
    accumulate: int
    precision: str
    use_closure: bool
    average: bool
    schedule: bool
    stops: tuple[Stop, ...]

    def undisturbed(self) -> Plan:
        """The same without an interruption, and with nothing around the optimizer or the model."""
        return replace(self, stops=(), wrapper="none", options=None)


def drawn(seed: int, processes: int = 1) -> Plan:
    """The plan of a seed."""
    chance = random.Random(seed)
    name = chance.choice(NAMES)
    closure = name in CLOSURE or chance.random() < 0.2
    wrappers = ["none", "none", "accelerated"] + ["chained"] * (name not in CLOSURE)
    if processes > 1 and not closure and "ScheduleFree" not in name and name not in NOT_PARTITIONED:
        wrappers.append("zero")
    delay, frequency = chance.randint(0, 8), chance.randint(1, 4)
    threshold = chance.choice([None, None, 0.9, 0.99])
    config = {
        "delay": delay,
        "frequency": frequency,
        "rule": FixedFraction(chance.choice([0.2, 0.5, 1.0])),
        "carry_moments": chance.random() < 0.7,
        "layer_share_step": chance.choice([0.34, 1.0]),
        "stability_threshold": threshold,
        "stability_frequency": threshold and chance.randint(1, 2),
        "stability_patience": 1,
    }
    # Among them those just before and after the conversion and a cut.
    moments = [*range(1, STEPS), delay - 1, delay, delay + frequency - 1, delay + frequency]
    # pytorch_optimizer's forget their own attributes in copies.
    copies = ["deepcopy", "pickle"] * (processes == 1 and name.partition(".")[0] in COPYABLE)
    ways = ["fresh", "warm", "back", *copies]
    stops = [
        Stop(
            at=min(max(0, chance.choice(moments)), STEPS - 1),
            within=chance.random() < 0.2,
            way=chance.choice(ways),
            order=chance.choice(ORDERS),
            warm=chance.randint(1, 11),
            outer=chance.random() < 0.5,
        )
        for _ in range(chance.randint(1, 2))
    ]
    options = chance.choice([None, *DDP_OPTIONS]) if processes > 1 else None
    # Torch's static_graph cannot begin with no_sync(), neither at first nor after a change.
    accumulate = 1 if options and options.get("static_graph") else chance.choice([1, 1, 2])
    return Plan(
        seed=seed,
        name=name,
        model=chance.choice(["linear", "mixed"]),
        wrapper=chance.choice(wrappers),
        options=options,
        config=config,
        accumulate=accumulate,
        precision=chance.choice(["fp32", "fp32", "autocast", "scaler"][: 3 if closure else 4]),
        use_closure=closure,
        average=chance.random() < 0.3,
        schedule=chance.random() < 0.3,
        stops=tuple(sorted(stops, key=lambda stop: (stop.at, stop.within))),
    )


class Mixed(nn.Module):
    """A convolution, packed projections, normalisation, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.middle = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 12), nn.GELU())
        self.last = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x[:, None]).mT)
        y = y + self.attention(y, y, y)[0]
        out: Tensor = self.last(self.middle(y).mean(1))
        return out


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "mixed":
        return Mixed()
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4))


@torch.no_grad()
def towards(average: Any, current: Any, _: Any) -> None:
    """An exponential average that can be pickled, which torch's own cannot."""
    torch._foreach_lerp_(average, current, 0.2)


class RandomRun:
    """Model, optimizer, controller, and what else a user would save, of one plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.losses = plan, [0.0] * STEPS
        net = make_model(plan.model)
        self.optimizer = self._wrapped(net)
        self.inner = OptimizerStack(self.optimizer).leaves[0]
        model = net if plan.options is None else DistributedDataParallel(net, **plan.options)
        self.average = AveragedModel(net, multi_avg_fn=towards) if plan.average else None
        averages = [self.average] if self.average is not None else []
        self.oialr = OIALR(model, self.optimizer, settings(**plan.config), averages=averages)
        scaled = plan.precision == "scaler"
        self.scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**126, growth_interval=3)
        self.scheduler = (
            StepLR(self.optimizer if plan.wrapper == "zero" else self.inner, 3, 0.7) if plan.schedule else None
        )

    def _wrapped(self, net: nn.Module) -> Any:
        name, wrapper = self.plan.name, self.plan.wrapper
        if wrapper == "zero":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own module compiles functions as it is imported
                from torch.distributed.optim import ZeroRedundancyOptimizer
            (group,) = make_optimizer(name, net).param_groups
            return ZeroRedundancyOptimizer(group["params"], find_class(name), **OPTIONS.get(name, {"lr": 1e-2}))
        optimizer = make_optimizer(name, net)
        return {"accelerated": Accelerated, "chained": Chained}.get(wrapper, lambda same: same)(optimizer)

    # -- training --------------------------------------------------------------------------------

    def train(self, until: int, *, within: bool = False) -> None:
        """So many steps; ``within``: and the first half of the next."""
        if callable(getattr(self.inner, "train", None)):
            self.inner.train()
        while self.oialr.t < until:
            self.update()
            self.finish()
        if within:
            self.update()

    def update(self) -> None:
        """Gradients and the optimizer's step."""
        torch.manual_seed(self.oialr.t)
        if self.plan.use_closure:
            loss = self.optimizer.step(self._gradients)
        else:
            loss = self._gradients()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.losses[self.oialr.t] = float(loss.detach())

    def finish(self) -> None:
        """What comes after it."""
        self.oialr.step()
        if self.scheduler is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of a step that the scaler skipped
                self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.oialr.module)

    def _gradients(self) -> Tensor:
        self.optimizer.zero_grad()
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        x, y = (part[rank::size].chunk(self.plan.accumulate) for part in batch(self.oialr.t))
        for i, (inputs, labels) in enumerate(zip(x, y, strict=True)):
            with self.oialr.no_sync() if i < len(x) - 1 else nullcontext():
                with torch.autocast("cpu", enabled=self.plan.precision == "autocast"):
                    loss = F.cross_entropy(self.oialr.model(inputs), labels) / len(x)
                self.scaler.scale(loss).backward()
        return loss

    # -- saving and loading ----------------------------------------------------------------------

    def interrupted(self, stop: Stop) -> RandomRun:
        """What goes on after it."""
        if stop.way == "deepcopy":
            return copy.deepcopy(self)
        if stop.way == "pickle":
            copied: RandomRun = pickle.loads(pickle.dumps(self))
            return copied
        state = self.state(stop.outer)
        other = self if stop.way == "back" else RandomRun(self.plan)
        losses = list(self.losses)
        if stop.way == "back" and stop.within:
            other.finish()
        if stop.way != "fresh":
            other.train(min(STEPS, other.oialr.t + stop.warm) if stop.way == "back" else stop.warm)
        other.load(state, stop)
        other.losses = losses
        return other

    def state(self, outer: bool) -> bytes:
        """All of it, as a file that rank 0 has written."""
        main, zero = not dist.is_initialized() or dist.get_rank() == 0, self.plan.wrapper == "zero"
        if zero:
            self.optimizer.consolidate_state_dict(0)
        parts = {
            "model": (self.oialr.model if outer else self.oialr.module).state_dict(),
            "optimizer": self.optimizer.state_dict() if main or not zero else None,
            "oialr": (self.oialr.state_dict(), self.oialr.tensor_state()),
            "scaler": self.scaler.state_dict(),
            "scheduler": self.scheduler and self.scheduler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }
        file = io.BytesIO()
        torch.save(parts, file)
        sent = [file.getvalue()]
        if dist.is_initialized():
            dist.broadcast_object_list(sent, src=0)
        return sent[0]

    def load(self, file: bytes, stop: Stop) -> None:
        """Take it on, in the order of ``stop``."""
        state = torch.load(io.BytesIO(file), weights_only=True)
        for name in stop.order:
            if name == "model":
                (self.oialr.model if stop.outer else self.oialr.module).load_state_dict(state["model"])
            elif name == "oialr":
                self.oialr.load_state_dict(*state["oialr"])
            else:
                self.optimizer.load_state_dict(state["optimizer"])
        for name in ("scaler", "scheduler", "average"):
            if state[name]:
                getattr(self, name).load_state_dict(state[name])

    # -- what it has come to ---------------------------------------------------------------------

    def result(self) -> dict[str, Any]:
        """Everything that another run must be equal to, bit for bit."""
        found: dict[str, Any] = {f"loss of step {t}": loss for t, loss in enumerate(self.losses)}
        found |= {"r": self.oialr.r, "t": self.oialr.t, "scale": self.scaler.get_scale()}
        found |= self.oialr.module.state_dict()
        if self.average is not None:
            found |= {f"average {key}": value for key, value in self.average.state_dict().items()}
        if self.plan.wrapper != "zero":
            for i, state in self.inner.state_dict()["state"].items():
                pairs = state.items() if isinstance(state, dict) else [("", state)]
                found |= {f"state {i} {key}": value for key, value in pairs}
        return found


def run(plan: Plan) -> dict[str, Any]:
    """What a plan comes to."""
    now = RandomRun(plan)
    for stop in plan.stops:
        if now.oialr.t > stop.at:
            continue
        now.train(stop.at, within=stop.within)
        now = now.interrupted(stop)
        if stop.within:
            now.finish()
    now.train(STEPS)
    return now.result()


def differences(plan: Plan) -> list[str]:
    """In what a plan's run differs from the undisturbed one: nothing."""
    expected, got = run(plan.undisturbed()), run(plan)
    if plan.wrapper == "zero":
        expected = {key: value for key, value in expected.items() if not key.startswith("state ")}
    if expected.keys() != got.keys():
        return sorted(expected.keys() ^ got.keys())
    return [key for key in expected if not same(expected[key], got[key])]


def same(first: Any, second: Any) -> bool:
    """Equal in every bit; NaN is NaN, as where L-BFGS diverges."""
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first.nan_to_num(), second.nan_to_num())
    return bool(first == second or str(first) == str(second))
