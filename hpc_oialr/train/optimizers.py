"""Optimizers as typed settings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hpc_oialr.errors import ConfigError, check_interval
from hpc_oialr.lowrank import Selection
from hpc_oialr.optim import muon_adamw


class OptimizerConfig(ABC):
    """Settings of one optimizer."""

    @abstractmethod
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a dense ``model`` on its final device."""


@dataclass(kw_only=True)
class AdamW(OptimizerConfig):
    """``torch.optim.AdamW``; weight decay on matrices and kernels only. arXiv 1711.05101.

    Parameters
    ----------
    lr
        Learning rate at the schedule's peak.
    weight_decay
        Decoupled; biases, norms and other parameters with one axis get none.
    betas, eps
        As torch's.
    fused
        One kernel for all parameters; null = on a GPU, unless parameters are sharded.
    """

    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    fused: bool | None = None

    def __post_init__(self) -> None:
        _check(self, "lr", "weight_decay", "eps")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Over two groups, with and without weight decay."""
        groups = decay_groups(model, self.weight_decay)
        on_gpu = _plain_on_gpu(groups)
        # torch captures no AdamW in a CUDA graph but a capturable one; fused=False would forbid its foreach kernels.
        return torch.optim.AdamW(
            groups,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=(on_gpu if self.fused is None else self.fused) or None,
            capturable=on_gpu,
        )


@dataclass(kw_only=True)
class SGD(OptimizerConfig):
    """``torch.optim.SGD``; weight decay on matrices and kernels only.

    Parameters
    ----------
    lr
        Learning rate at the schedule's peak.
    momentum, nesterov
        As torch's.
    weight_decay
        Added to the gradient; biases, norms and other parameters with one axis get none.
    """

    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        _check(self, "lr", "weight_decay")
        if self.nesterov and not self.momentum:
            raise ConfigError("nesterov", True, "needs a momentum above 0")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Over two groups, with and without weight decay."""
        groups = decay_groups(model, self.weight_decay)
        fused = _plain_on_gpu(groups) or None
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=fused)


@dataclass(kw_only=True)
class MuonAdamW(OptimizerConfig):
    """:func:`hpc_oialr.muon_adamw`: Muon for the weights that can become low-rank, AdamW for the rest.

    Parameters
    ----------
    lr
        Learning rate of dense matrices at the schedule's peak; Muon's is a step in spectral norm.
    core_lr
        Muon's learning rate of the cores at the schedule's peak; null = a fixed multiple of ``lr``.
    bases_lr
        Muon's learning rate of U and Vh at the schedule's peak, without weight decay; needed where ``oialr.train`` or
        ``oialr.bases_trained`` trains them.
    adamw_lr
        Learning rate of the rest at the schedule's peak.
    dense_algorithm
        What trains matrices while they are dense.
    selection
        Which layers' weights count as matrices; as in ``oialr.selection``.
    weight_decay
        Decoupled, for both.
    momentum, nesterov, newton_schulz_steps
        Muon's.
    newton_schulz_dtype
        Null: bf16 for dense matrices where the hardware multiplies it, fp32 for cores. In bf16 runs on another
        number of processes drift apart by 1e-3 of the loss within a hundred dense steps, in fp32 by 1e-6. On a GPU
        "fp32" multiplies in TF32 where ``train.tf32`` allows, "tf32" in any case.
    betas
        AdamW's.
    """

    lr: float = 0.01
    core_lr: float | None = None
    bases_lr: float | None = None
    adamw_lr: float = 1e-3
    dense_algorithm: Literal["muon", "adamw"] = "muon"
    selection: Selection = field(default_factory=Selection)
    weight_decay: float = 0.01
    momentum: float = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5
    newton_schulz_dtype: Literal["bf16", "tf32", "fp32"] | None = None
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        _check(self, "lr", "adamw_lr", "core_lr", "bases_lr", "weight_decay")
        if self.newton_schulz_steps < 1:
            raise ConfigError("newton_schulz_steps", self.newton_schulz_steps, "must be at least 1")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Muon beside AdamW."""
        dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
        chosen = self.newton_schulz_dtype
        settings = vars(self) | {"newton_schulz_dtype": dtypes.get(chosen or "", chosen)}
        return muon_adamw(model, **settings)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: those with two axes or more decay, the others don't."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _plain_on_gpu(groups: list[dict[str, Any]]) -> bool:
    """Whether torch's fused optimizers take these: they refuse DTensors, or lists of some and plain tensors."""
    return all(p.is_cuda and not isinstance(p, DTensor) for group in groups for p in group["params"])


def _check(settings: OptimizerConfig, *rates: str) -> None:
    """Raise :class:`ConfigError` unless rates are at least 0, betas and momentum in [0, 1)."""
    for name in rates:
        value = getattr(settings, name)
        if not (value is None or value >= 0):
            raise ConfigError(name, value, "must not be negative")
    for beta in getattr(settings, "betas", ()):
        check_interval("betas", beta, 0, 1, closed=(True, False))
    check_interval("momentum", getattr(settings, "momentum", 0.0), 0, 1, closed=(True, False))
