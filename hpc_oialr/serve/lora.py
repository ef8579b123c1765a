"""What a run changed in a base model, as a LoRA adapter of PEFT: two thin factors a layer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpc_oialr.errors import ConfigError, MissingExtraError, ModelError
from hpc_oialr.finetune import SaraLinear, adapters
from hpc_oialr.linalg.arithmetic import exact_arithmetic
from hpc_oialr.linalg.svd import svd
from hpc_oialr.lowrank import untied_state
from hpc_oialr.lowrank.targets import kind_of
from hpc_oialr.models.base import prepare_transformers

# PEFT's own layers for these; others are saved whole where they differ.
KINDS = ("Linear", "Conv1D")


@dataclass(frozen=True)
class Difference:
    """``W - W0`` of one layer as ``B A``; what is cut off is ``error``, relative, in the Frobenius norm."""

    A: Tensor  # r x in
    B: Tensor  # out x r
    bias: Tensor | None  # difference of the biases
    error: float

    @property
    def r(self) -> int:
        """Inner dimension."""
        return int(self.A.shape[0])


def load_base(folder: Path) -> nn.Module:
    """The base model of an adapter, a folder that transformers loads; ModelError if it is none."""
    prepare_transformers()
    import transformers

    try:
        names = transformers.AutoConfig.from_pretrained(folder).architectures or []
        kind = getattr(transformers, names[0] if names else "AutoModel")
        base: nn.Module = kind.from_pretrained(folder)
    except Exception as error:
        cause = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{folder} is no base model ({cause}); --base needs a folder with config.json and model.safetensors, such as "
            "oialr export --format dense writes."
        ) from error
    return base.eval()


@exact_arithmetic()
def differences(base: nn.Module, tuned: nn.Module, r: int | None) -> tuple[dict[str, Difference], list[str]]:
    """The factors of every linear layer that differs, and the modules that must be saved whole.

    With ``r`` None the factors are exact but for rounding, and a layer of which they would be larger than its weight is
    saved whole; otherwise the best ``r`` are taken, and the rest is cut. Raises ModelError if the models are of
    different classes or sizes.
    """
    if r is not None and r < 1:
        raise ConfigError("r", r, "must be at least 1")
    before, after = untied_state(base), untied_state(tuned)
    same = type(base) is type(tuned) and {n: t.shape for n, t in before.items()} == {
        n: t.shape for n, t in after.items()
    }
    if not same:
        raise ModelError(
            f"the base model, a {type(base).__name__}, has other layers than the run's {type(tuned).__name__}: an "
            "adapter needs two models of one architecture."
        )
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name].to(tensor.dtype))}
    shared = _shared(tuned)
    factors: dict[str, Difference] = {}
    for name, layer in tuned.named_modules():
        weight = f"{name}.weight"
        if kind_of(type(layer)) in KINDS and weight in changed and name not in shared:
            found = _difference(base.get_submodule(name), layer, name, r)
            if found is not None:
                factors[name] = found
                changed -= {weight, f"{name}.bias"}
    whole = {name.rpartition(".")[0] for name in after if name in changed}
    # PEFT would save one name of a tied weight, and the other one would keep the base's.
    whole |= {other for name in whole & shared.keys() for other in shared[name]}
    if "" in whole:
        raise ModelError(
            f"{type(tuned).__name__} has trained parameters of its own, outside of its layers: PEFT saves layers."
        )

    def inside(name: str) -> bool:
        return any(name.startswith(f"{other}.") for other in whole)

    # Of two modules to be saved, one inside the other, the outer one holds both; adapted layers inside it as well.
    return {name: each for name, each in factors.items() if not inside(name)}, sorted(n for n in whole if not inside(n))


def sara_factors(tuned: nn.Module, head: Collection[str]) -> tuple[dict[str, Difference], list[str]]:
    """As :func:`differences`, of a model that SARA has fine-tuned: its own factors, and its head."""
    factors = {}
    for name, layer in adapters(tuned).items():
        assert isinstance(layer, SaraLinear)
        factors[name] = Difference(layer.B.detach(), (layer.A * layer.lambda_).detach(), None, 0.0)
    return factors, sorted(head)


def _difference(base: Any, tuned: Any, name: str, r: int | None) -> Difference | None:
    delta = (tuned.weight.double() - base.weight.double()).detach()
    if kind_of(type(tuned)) == "Conv1D":
        delta = delta.mT
    U, s, Vh = svd(delta, name=name)
    # What rounding of two weights of this size makes of a difference, about twice the spectral norm of such noise.
    norm, eps = float(torch.linalg.matrix_norm(tuned.weight.double())), torch.finfo(tuned.weight.dtype).eps
    exact = max(1, int((s > 4 * eps * norm / len(s) ** 0.5).sum()))
    kept = exact if r is None else min(r, exact)
    if r is None and kept * sum(delta.shape) >= delta.numel():
        return None
    root = s[:kept].sqrt()
    error = float(s[kept:].square().sum().sqrt() / s.square().sum().sqrt())
    bias = None if tuned.bias is None else (tuned.bias - base.bias).detach()
    if bias is not None and not bool(bias.any()):
        bias = None
    dtype = tuned.weight.dtype
    return Difference((root[:, None] * Vh[:kept]).to(dtype), (U[:, :kept] * root).to(dtype), bias, error)


def _shared(model: nn.Module) -> dict[str, list[str]]:
    """Modules that hold a tied weight, each with all that hold the same."""
    holders: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    return {name: names for names in holders.values() if len(names) > 1 for name in names}


def save_adapter(
    base: nn.Module, tuned: nn.Module, found: tuple[Mapping[str, Difference], list[str]], folder: Path, origin: str
) -> None:
    """Write the adapter's folder by PEFT itself; ``base`` is changed. MissingExtraError without peft."""
    peft = require_peft()
    factors, whole = found
    if not factors:
        raise ModelError(f"no linear layer of the run differs from {origin} by few directions; choose --lora-r.")
    ranks = {name: each.r for name, each in factors.items()}
    biased = any(each.bias is not None for each in factors.values())
    config = peft.LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),  # the product is added as it is: alpha / r = 1
        rank_pattern={f"^{re.escape(name)}$": r for name, r in ranks.items()},
        alpha_pattern={f"^{re.escape(name)}$": r for name, r in ranks.items()},
        target_modules=list(ranks),
        modules_to_save=whole or None,
        lora_bias=biased,
        lora_dropout=0.0,
        fan_in_fan_out=all(kind_of(type(base.get_submodule(name))) == "Conv1D" for name in ranks),
        base_model_name_or_path=origin,
        inference_mode=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it sets by itself, such as fan_in_fan_out of single layers
        adapted: Any = peft.get_peft_model(base, config)
        with torch.no_grad():
            for name, each in factors.items():
                layer = adapted.base_model.model.get_submodule(name)
                layer.lora_A["default"].weight.copy_(each.A)
                layer.lora_B["default"].weight.copy_(each.B)
                if biased:
                    bias = layer.lora_B["default"].bias
                    bias.zero_() if each.bias is None else bias.copy_(each.bias)
            for name in whole:
                copied = adapted.base_model.model.get_submodule(name).modules_to_save["default"]
                copied.load_state_dict(tuned.get_submodule(name).state_dict())
        adapted.save_pretrained(folder)


def require_peft() -> Any:
    """PEFT; MissingExtraError without it."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "peft", purpose="--format lora") from error
    return peft


def load_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """The base model with the adapter, as PEFT loads it."""
    peft = require_peft()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded: nn.Module = peft.PeftModel.from_pretrained(base, folder).eval()
    return loaded
