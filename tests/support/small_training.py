"""A model of three layers, its data, and a loop of a user's own around the controller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RelativeCutoff
from hpc_oialr.distributed import World
from hpc_oialr.engines import TensorEngine

MakeOptimizer = Callable[[nn.Module], Any]


def small_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)]
    return nn.Sequential(*layers).to(dtype)


def on_shards(size: int) -> tuple[nn.Sequential, TensorEngine]:
    """The small model under tensor parallelism over all ``size`` processes."""
    torch.set_num_threads(1)
    engine, model = TensorEngine(World.from_environment(device="cpu"), size=size), small_model()
    engine.place(model)
    return model, engine


def batch(t: int, dtype: torch.dtype = torch.float32, size: int = 32) -> tuple[Tensor, Tensor]:
    """The samples of step ``t``."""
    x = torch.randn(size, 12, generator=torch.Generator().manual_seed(1000 + t)).to(dtype)
    return x, x[:, :4].argmax(1)


def settings(**options: Any) -> OIALRConfig:
    """Converts after 4 steps, and cuts a little every 3."""
    defaults: dict[str, Any] = {
        "delay": 4,
        "frequency": 3,
        "rule": FixedFraction(0.5),
        "layer_share_step": 1.0,
    }
    return OIALRConfig(**{**defaults, **options})


CUT_NOTHING = RelativeCutoff(1e-9)


def train(oialr: OIALR, optimizer: Any, steps: int, *, use_closure: bool = False, same: bool = False) -> list[float]:
    """Losses of so many more steps; ``optimizer`` is stepped as its user would; on the ``same`` batch or on new ones."""
    losses = []
    dtype = next(p.dtype for p in oialr.module.parameters())
    for _ in range(steps):
        x, y = batch(0 if same else oialr.t, dtype)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(oialr.model(x), y)
            loss.backward()
            return loss

        if use_closure:
            loss = optimizer.step(closure)
        else:
            loss = closure()
            optimizer.step()
        losses.append(float(loss.detach()))
        oialr.step()
    return losses


def controlled(make: MakeOptimizer, model: nn.Module | None = None, **options: Any) -> tuple[OIALR, Any]:
    """A controller and its optimizer around a new model."""
    model = small_model() if model is None else model
    optimizer = make(model)
    return OIALR(model, optimizer, settings(**options)), optimizer


class Lookahead:
    """Slow weights in a state of its own, around any optimizer (arXiv 1907.08610)."""

    def __init__(self, optimizer: Optimizer, k: int = 2, alpha: float = 0.5) -> None:
        self.optimizer, self.k, self.alpha, self.count = optimizer, k, alpha, 0
        self.state = {p: {"slow_params": p.detach().clone()} for g in self.param_groups for p in g["params"]}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        loss = self.optimizer.step(closure)  # type: ignore[arg-type]
        self.count += 1
        if self.count % self.k == 0:
            for p, state in self.state.items():
                state["slow_params"].lerp_(p, self.alpha)
                p.copy_(state["slow_params"])
        return loss


class SharpnessAware(Optimizer):
    """Gradients at a disturbed weight, taken by a closure (SAM, arXiv 2010.01412)."""

    def __init__(self, params: Any, base: type[Optimizer], rho: float = 0.01, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)  # type: ignore[call-arg]
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
            self.state[p]["old_p"] = p.detach().clone()
            p.add_(p.grad, alpha=self.param_groups[0]["rho"])
        with torch.enable_grad():
            closure()
        for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
            p.copy_(self.state[p]["old_p"])
        self.base_optimizer.step()
        return loss


class Accelerated(Optimizer):
    """As Accelerate's: no ``super().__init__()``, everything is handed on."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)  # type: ignore[assignment]
    param_groups = property(lambda self: self.optimizer.param_groups)  # type: ignore[assignment]
    defaults = property(lambda self: self.optimizer.defaults)  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)


class Chained:
    """Several optimizers, each of some parameters."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = list(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state_dict[str(i)])
