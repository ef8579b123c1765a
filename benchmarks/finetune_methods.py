"""Chosen by their full path in the recipe: SARA's rivals (PEFT's LoRA and PiSSA, LoRA-XS), the model's own pooling."""

from __future__ import annotations

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpc_oialr.data import Splits, TextClasses
from hpc_oialr.finetune import AdaptedLinear, FineTuning
from hpc_oialr.finetune.methods import adaptable, train_only
from hpc_oialr.linalg.svd import svd
from hpc_oialr.lowrank import Selection
from hpc_oialr.models import PretrainedClassifier

LAYERS = Selection(kinds=("Linear",))


@dataclass(kw_only=True)
class MeanPooled(PretrainedClassifier):
    """The classifier of the mean over all tokens, as this model was made to be used; the stock head takes [CLS]."""

    def pretrained(self) -> tuple[nn.Module, set[str]]:
        """With a pooler of no parameters."""
        model, head = super().pretrained()
        bert: Any = model.get_submodule("bert")
        bert.pooler = Mean()
        return model, head


class Mean(nn.Module):
    """Over the tokens, padding included, of which passages that fill the sequence have none."""

    def forward(self, hidden: Tensor) -> Tensor:
        """B x T x n to B x n."""
        return hidden.mean(1)


@dataclass(frozen=True, kw_only=True)
class OnceRead(TextClasses):
    """Read once in a process."""

    @functools.cache  # noqa: B019
    def _load(self) -> Splits:
        return super()._load()


@dataclass(kw_only=True)
class PeftLoRA(FineTuning):
    """PEFT's LoRA with alpha = r, so that the product is added as it is; "pissa" is PiSSA (arXiv 2404.02948)."""

    r: int = 2
    initial: Literal["lora", "pissa"] = "lora"

    def apply(self, model: nn.Module, head: Collection[str] = ()) -> None:
        """Let PEFT put its layers into the model."""
        import peft

        names = [target.name for target in adaptable(model, LAYERS, head)]
        start = "pissa" if self.initial == "pissa" else True
        config = peft.LoraConfig(r=self.r, lora_alpha=self.r, target_modules=names, init_lora_weights=start)
        peft.inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or any(name.startswith(f"{part}.") for part in head))


@dataclass(kw_only=True)
class LoRAXS(FineTuning):
    """``W + U_r diag(s_r) R Vh_r`` with only R (r x r) trained, zero at the start. arXiv 2405.17604."""

    r: int = 48

    def apply(self, model: nn.Module, head: Collection[str] = ()) -> None:
        """Replace the layers."""
        layers = {target.name: target.owner for target in adaptable(model, LAYERS, head)}
        train_only(model, head)
        for name, layer in layers.items():
            assert isinstance(layer, nn.Linear)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, XSLinear(layer, self.r))


class XSLinear(AdaptedLinear):
    """A layer of :class:`LoRAXS`."""

    def __init__(self, dense: nn.Linear, r: int) -> None:
        super().__init__(dense)
        found, self.r = svd(dense.weight).leading(r), r
        self.left = nn.Parameter(found.U * found.s, requires_grad=False)
        self.right = nn.Parameter(found.Vh.contiguous(), requires_grad=False)
        self.core = nn.Parameter(torch.zeros(r, r))

    def forward(self, input: Tensor) -> Tensor:
        """Input (..., n), output (..., m)."""
        z = F.linear(F.linear(input, self.right), self.core)
        return F.linear(input, self.weight, self.bias) + F.linear(z, self.left)

    def addition(self, *, mean: bool = False) -> Tensor:
        """``U_r diag(s_r) R Vh_r``."""
        return self.left.double() @ self.core.double() @ self.right.double()
