"""The sides of the comparison: what each makes of a model, and what it does to it on the way."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec, module_from_spec
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.cifar.training import adamw
from benchmarks.cifar.variants import Line, Variant
from benchmarks.rivals.factors import become_factors, spectron
from benchmarks.rivals.problems import Data
from hpc_oialr import OIALR, OIALRConfig, RankLimits, muon_adamw
from hpc_oialr.lowrank import Selection, select
from hpc_oialr.train.cuda_graph import SHORTEST

# r over k of every side that is low-rank, at its end.
FRACTION = 0.25
# Where the dense run is cut, and OIALR's bases begin to follow.
LATE = 0.7
RATES = (2.0, 1.0, 4.0)
"""Multiples of a side's base rate it is tuned by, the most likely first."""


class Life:
    """One side in one run: a model, its optimizer, and what is done after a step. This one does nothing.

    Attributes
    ----------
    cut
        The step after which the model is cut, or None.
    refusal
        Why the steps cannot be a CUDA graph, or "".
    clip
        Bound on the gradient's norm in place of the problem's, or None.
    """

    cut: int | None = None
    refusal = ""
    clip: float | None = None

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    @property
    def eager(self) -> bool:
        """Whether hooks of the model must run in the next step."""
        return False

    def hooked_steps(self, steps: int) -> int:
        """How many steps of a run of ``steps`` are eager for that."""
        return 0

    def after(self, done: int) -> bool:
        """Called after each step; whether parameters or the optimizer's state were replaced."""
        return False

    def tensors(self) -> list[Tensor]:
        """What lives beside the model and the optimizer's own state."""
        states = self.optimizer.state.values()
        found = [getattr(state.get("projector"), "ortho_matrix", None) for state in states]
        return [tensor for tensor in found if isinstance(tensor, Tensor)]


@dataclass(frozen=True)
class Side:
    """A side by name.

    Attributes
    ----------
    start
        Makes its life of a dense model at its start: model, data, number of steps, multiple of its base rates.
    package
        Of PyPI, where it needs one.
    """

    name: str
    start: Callable[[nn.Module, Data, int, float], Life]
    package: str | None = None

    @property
    def missing(self) -> str:
        """Why it cannot run here, or ""."""
        if self.package is None or find_spec(self.package.replace("-", "_")) is not None:
            return ""
        return f"{self.package} is missing: pip install --no-deps {self.package}"


def r_of(model: nn.Module) -> Callable[[int], int]:
    """r of a weight by its k at the end, as OIALR rounds it: the same for all sides."""
    return RankLimits(at_conversion=FRACTION, round_to=_multiple(model)).initial


def _multiple(model: nn.Module) -> int:
    widest = max(target.k for target in select(model))
    return 64 if widest >= 512 else 8 if widest >= 64 else 4


def _dense_adamw(model: nn.Module, data: Data, steps: int, rate: float) -> Life:
    return Life(model, adamw(model, rate * data.problem.adamw_lr, data.problem.weight_decay))


def _dense_muon(model: nn.Module, data: Data, steps: int, rate: float) -> Life:
    return Life(model, _muon(model, data, rate))


def _muon(model: nn.Module, data: Data, rate: float, *, bases: bool = False) -> Optimizer:
    problem = data.problem
    lr = rate * problem.muon_lr
    return muon_adamw(
        model, lr=lr, bases_lr=lr if bases else None, adamw_lr=rate * problem.rest_lr,
        weight_decay=problem.weight_decay,
    )  # fmt: skip


class OialrLife(Life):
    """OIALR by the settings of a :class:`benchmarks.cifar.Variant`."""

    def __init__(self, variant: Variant, model: nn.Module, data: Data, steps: int, rate: float) -> None:
        published = variant.optimizer == "adamw"
        if published:
            optimizer: Optimizer = adamw(model, rate * data.problem.adamw_lr, variant.weight_decay)
        else:
            optimizer = _muon(model, data, rate, bases=variant.free_from is not None)
        super().__init__(model, optimizer)
        self.variant, self.steps, self.clip = variant, steps, variant.clip
        variant = replace(variant, round_to=variant.round_to or _multiple(model))
        config, self.rule = variant.oialr(steps, 0)
        config.moments_steps = self._window(int(config.delay))
        self.oialr = OIALR(model, optimizer, config)
        self.cut = int(config.delay)

    @staticmethod
    def _window(delay: int) -> int:
        """The method's own steps of moments, at most a third of what lies before the conversion."""
        return max(1, min(OIALRConfig.moments_steps, delay // 3))

    def hooked_steps(self, steps: int) -> int:
        """Before the conversion, and a twentieth of ``frequency`` before the one update that cuts."""
        if self.variant.importance == "weights":
            return 0
        every = (self.variant.until - self.variant.delay) * steps / self.variant.cuts
        return self._window(round(self.variant.delay * steps)) + max(1, int(every) // 20)

    def refuse_graph(self, steps: int) -> str:
        """Why no graph pays in a run of ``steps``, or ""."""
        every = (self.variant.until - self.variant.delay) * steps / self.variant.cuts
        return "" if every >= SHORTEST else f"r changes every {every:.0f} steps: too often"

    @property
    def eager(self) -> bool:
        """Where the method's hooks gather moments."""
        return bool(self.oialr.gathered)

    def after(self, done: int) -> bool:
        """The method's step."""
        if isinstance(self.rule, Line):
            begin, end = self.variant.delay * self.steps, self.variant.until * self.steps
            self.rule.progress = (done - begin) / (end - begin)
        trained = [id(p) for p in self.model.parameters() if p.requires_grad]
        report = self.oialr.step()
        return (report is not None and report.reshaped) or trained != [
            id(p) for p in self.model.parameters() if p.requires_grad
        ]


CORES = Variant(
    name="cores", low_rank=True, delay=0.3, until=0.5, cuts=1, at_conversion=2 * FRACTION, fraction=FRACTION,
    min_fraction=FRACTION, importance="inputs",
)  # fmt: skip
PUBLISHED = Variant(
    name="published", low_rank=True, optimizer="adamw", weight_decay=0.01, clip=5.0, rule="RelativeCutoff:0.15",
    delay=1 / 6, until=1.0, cuts=25, at_conversion=1.0, round_to=1, carry=False, core_lr_scale=1.0, layer_share=0.1,
)  # fmt: skip
FROM_START = Variant(
    name="from the start", low_rank=True, delay=0.0, until=1.0, cuts=1, at_conversion=FRACTION, fraction=FRACTION
)


def _factors(model: nn.Module, data: Data, steps: int, rate: float, *, silu: bool = False) -> Life:
    """Two factors under AdamW from the start."""
    become_factors(model, Selection(), r_of(model), silu=silu)
    return _dense_adamw(model, data, steps, rate)


def _spectron(model: nn.Module, data: Data, steps: int, rate: float) -> Life:
    layers = become_factors(model, Selection(), r_of(model))
    return Life(model, _spectron_optimizer(model, layers, data, rate))


def _spectron_optimizer(model: nn.Module, layers: Any, data: Data, rate: float) -> Optimizer:
    problem = data.problem
    lr, adamw_lr = rate * problem.muon_lr, rate * problem.rest_lr
    return spectron(model, layers, lr=lr, adamw_lr=adamw_lr, weight_decay=problem.weight_decay)


class TruncatedLife(Life):
    """Dense Muon, cut by the SVD of its weights to two factors, which Spectron's step then trains."""

    def __init__(self, model: nn.Module, data: Data, steps: int, rate: float) -> None:
        super().__init__(model, _muon(model, data, rate))
        self.data, self.rate, self.cut = data, rate, max(1, round(LATE * steps))

    def after(self, done: int) -> bool:
        """The cut, once."""
        if done != self.cut:
            return False
        layers = become_factors(self.model, Selection(), r_of(self.model))
        self.optimizer = _spectron_optimizer(self.model, layers, self.data, self.rate)
        return True


def truncated(model: nn.Module, data: Data) -> nn.Module:
    """A copy of a dense model, cut by the SVD of its weights to the r of all sides."""
    model = copy.deepcopy(model)
    become_factors(model, Selection(), r_of(model))
    return model


def _projected(
    model: nn.Module, data: Data, steps: int, rate: float, *, package: str, factor: float, settings: dict[str, Any]
) -> Life:
    """AdamW of another package that projects the gradients of the selected weights to r = k / 4.

    Convolutions are given to it flattened. Rates of projected weights are ``factor`` times those of the rest, which makes
    up for the package's own scale of their steps.
    """
    problem = data.problem
    # New projections eight times a run, which at these lengths is every 40 to 200 steps.
    every = min(200, max(1, round(steps / 8)))
    choose = r_of(model)
    targets = select(model)
    taken = {id(target.weight) for target in targets}
    views: list[tuple[nn.Parameter, nn.Parameter]] = []
    groups: list[dict[str, Any]] = []
    lr = rate * problem.adamw_lr
    for r in sorted({choose(target.k) for target in targets}):
        weights = [target.weight for target in targets if choose(target.k) == r]
        flat = [nn.Parameter(weight.data.flatten(1)) if weight.dim() > 2 else weight for weight in weights]
        views += [(weight, view) for weight, view in zip(weights, flat, strict=True) if view is not weight]
        groups.append({"params": flat, "lr": factor * lr, "rank": r, "update_proj_gap": every, **settings})
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups.append({"params": [p for p in rest if p.dim() > 1], "lr": lr})
    groups.append({"params": [p for p in rest if p.dim() <= 1], "lr": lr, "weight_decay": 0.0})
    for group in groups[:-2]:
        # The projected step, and with it the decay, has a larger rate.
        group["weight_decay"] = problem.weight_decay / factor
    made = _without_8bit(package, "adamw" if package == "galore_torch" else "apollo").AdamW
    groups = [group for group in groups if group["params"]]
    optimizer: Optimizer = made(groups, weight_decay=problem.weight_decay, no_deprecation_warning=True)
    optimizer.register_step_pre_hook(partial(_give_gradients, views))
    life = Life(model, optimizer)
    life.refusal = f"{package} computes on the host"
    return life


def _give_gradients(views: list[tuple[nn.Parameter, nn.Parameter]], *_: object) -> None:
    for weight, view in views:
        view.grad = None if weight.grad is None else weight.grad.flatten(1)


def _without_8bit(package: str, module: str) -> Any:
    """A module of a package whose own import would need bitsandbytes, for optimizers that are not used here."""
    if package not in sys.modules:
        spec = find_spec(package)
        assert spec is not None
        sys.modules[package] = module_from_spec(spec)
    return importlib.import_module(f"{package}.{module}")


_galore = partial(_projected, package="galore_torch", factor=4.0, settings={"scale": 0.25, "proj_type": "std"})
# Its step has the norm of an AdamW step of r features: sqrt(n / r) = 2 too small.
_apollo = partial(
    _projected, package="apollo_torch", factor=2.0,
    settings={"scale": 1.0, "proj_type": "std", "proj": "random", "scale_type": "channel"},
)  # fmt: skip

SIDES = {
    side.name: side
    for side in (
        Side("dense, Muon", _dense_muon),
        Side("OIALR", partial(OialrLife, CORES)),
        Side("OIALR, bases follow", partial(OialrLife, replace(CORES, name="bases follow", free_from=LATE))),
        Side("dense, AdamW", _dense_adamw),
        Side("Spectron", _spectron),
        Side("two factors, AdamW", _factors),
        Side("GaLore", _galore, "galore-torch"),
        Side("APOLLO", _apollo, "apollo-torch"),
        Side("truncated, then trained", TruncatedLife),
        Side("cores from the start", partial(OialrLife, FROM_START)),
        Side("OIALR, published", partial(OialrLife, PUBLISHED)),
        Side("CoLA", partial(_factors, silu=True)),
    )
}
"""By name, the most telling first."""


def tensors_of(life: Life) -> list[nn.Module | Optimizer | Tensor]:
    """All that lives between steps."""
    return [life.model, life.optimizer, *life.tensors()]


def stored_numbers(model: nn.Module) -> int:
    """Numbers of the model as it is after the training: parameters and bases, each once."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()}
    return sum(t.numel() for t in tensors.values())
