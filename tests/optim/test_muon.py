"""MuonAdamW against torch's own Muon and AdamW."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hpc_oialr import MuonAdamW, Selection, muon_adamw
from hpc_oialr.errors import ConfigError, UnknownNameError
from hpc_oialr.lowrank import convert
from hpc_oialr.optim.core_lr import CoreLearningRate
from hpc_oialr.torch_compat import FakeTensorMode, TorchDispatchMode
from hpc_oialr.train.checkpoint import load_optimizer
from hpc_oialr.train.optimizers import SGD as RecipeSGD
from hpc_oialr.train.optimizers import AdamW as RecipeAdamW
from hpc_oialr.train.optimizers import MuonAdamW as RecipeMuonAdamW
from hpc_oialr.train.optimizers import OptimizerConfig


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3))


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 5) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = model(torch.randn(8, 6, generator=generator)).square().mean()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_equals_torch_muon_beside_torch_adamw() -> None:
    ours, theirs = network(), network()
    optimizer = muon_adamw(ours, lr=0.02, adamw_lr=1e-3, weight_decay=0.1, newton_schulz_dtype=torch.bfloat16)
    matrices = [theirs[i].weight for i in (0, 2, 3)]
    rest = [p for p in theirs.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
    decayed = [p for p in rest if p.dim() > 1]
    groups = [{"params": decayed}, {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    train(ours, [optimizer])
    train(theirs, [muon, adamw])
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Newton-Schulz runs in bf16, batched here and one by one there.
        torch.testing.assert_close(p, q, rtol=0, atol=4e-3 if p.dim() == 2 else 1e-4, msg=name)


def test_convolutions_are_flattened() -> None:
    conv, flat = nn.Conv2d(3, 8, 2, bias=False), nn.Parameter(torch.zeros(8, 12))
    with torch.no_grad():
        flat.copy_(conv.weight.flatten(1))
    conv.weight.grad = torch.randn(8, 3, 2, 2)
    flat.grad = conv.weight.grad.flatten(1)
    for parameter in (conv.weight, flat):
        MuonAdamW([parameter], lr=0.1).step()
    torch.testing.assert_close(conv.weight.flatten(1), flat)


def test_state_dict_round_trip_and_scheduler() -> None:
    model = network()
    optimizer = muon_adamw(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    train(model, [optimizer])
    scheduler.step()
    twin = copy.deepcopy(model)
    other = muon_adamw(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, [optimizer])
    train(twin, [other])
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def load(way: str, optimizer: torch.optim.Optimizer, state: dict[str, Any], model: nn.Module) -> None:
    """Load ``state``, whose tensors are on the CPU as a checkpoint's are, into an optimizer of another device."""
    if way == "torch's":
        optimizer.load_state_dict(state)
        return
    names = {p: name for name, p in model.named_parameters()}
    held = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    order = [name for members in held for name in members]
    tensors = {f"{order[i]}.{key}": value for i, values in state["state"].items() for key, value in values.items()}
    options = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
    groups = [{"names": a, "options": b} for a, b in zip(held, options, strict=True)]
    load_optimizer(model, optimizer, tensors, {"groups": groups, "values": {}})


@pytest.mark.parametrize("way", ["torch's", "the trainer's"])
@pytest.mark.parametrize("older", [False, True])
def test_step_counters_lie_where_the_fused_kernel_reads_them_after_loading(way: str, older: bool) -> None:
    makers: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "ours": muon_adamw,
        "torch's fused": lambda m: torch.optim.AdamW(m.parameters(), fused=True),
        "torch's": lambda m: torch.optim.AdamW(m.parameters()),
    }
    for name, make in makers.items():
        model = network()
        optimizer = make(model)
        train(model, [optimizer])
        state = copy.deepcopy(optimizer.state_dict())
        if older and name == "ours":
            for group in state["param_groups"]:
                del group["fused"]
        elsewhere = network().to("meta")
        other = make(elsewhere)
        load(way, other, state, elsewhere)
        counted = [(p, values) for p, values in other.state.items() if "step" in values]
        assert len(counted) >= 7
        for p, values in counted:
            # Only a fused kernel wants its counters on the device; the others wait for them there.
            assert values["step"].device.type == ("cpu" if name == "torch's" else "meta")
            assert values["step"].dtype == torch.float32
            assert values["exp_avg"].device == p.device


def test_groups() -> None:
    model = network()
    optimizer = muon_adamw(model, lr=0.01)
    matrices, cores, rest, vectors = optimizer.param_groups
    assert [tuple(p.shape) for p in matrices["params"]] == [(12, 6), (12, 12), (12, 12)]
    assert cores["params"] == []
    assert cores["lr"] == pytest.approx(0.015)
    assert [tuple(p.shape) for p in rest["params"]] == [(3, 12)]
    assert vectors["weight_decay"] == 0.0
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    convert(model)
    groups = muon_adamw(model, selection=Selection(exclude=("*",))).param_groups
    assert [tuple(p.shape) for p in groups[1]["params"]] == [(6, 6), (12, 12), (12, 12)]


def test_bad_groups() -> None:
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(
        ConfigError, match=r"params is \(3,\); must have at least two axes under Muon. Give it algorithm"
    ):
        MuonAdamW([p])
    with pytest.raises(UnknownNameError, match="unknown algorithm 'moun'; valid: adamw, muon. Did you mean 'muon'"):
        MuonAdamW([{"params": [p], "algorithm": "moun"}])
    with pytest.raises(ConfigError, match="lr is -1; must not be negative"):
        MuonAdamW([{"params": [p], "algorithm": "adamw"}], lr=-1)
    with pytest.raises(ConfigError, match=r"momentum is 1.0; must lie in \[0, 1\)"):
        MuonAdamW([{"params": [p], "algorithm": "adamw"}], momentum=1.0)


def test_a_recipe_may_choose_newton_schulz_dtype() -> None:
    chosen = RecipeMuonAdamW(newton_schulz_dtype="fp32").build(network())
    assert {group["newton_schulz_dtype"] for group in chosen.param_groups} == {torch.float32}
    assert RecipeMuonAdamW().build(network()).param_groups[0]["newton_schulz_dtype"] is None
    chosen = RecipeMuonAdamW(newton_schulz_dtype="tf32").build(network())
    assert chosen.param_groups[0]["newton_schulz_dtype"] == "tf32"


def test_a_rate_may_be_a_tensor() -> None:
    models = [network() for _ in range(2)]
    for model, convert_rate in zip(models, (float, torch.tensor), strict=True):
        optimizer = muon_adamw(model, weight_decay=0.1, newton_schulz_dtype=torch.float64)
        for step in range(3):
            for group in optimizer.param_groups:
                group["lr"] = convert_rate(0.02 / (1 + step))
            train(model, [optimizer], steps=1)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


class Launches(TorchDispatchMode):
    """Counts the kernels that operations launch, by name: foreach ones launch one, but strided copies one each."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        self.devices |= {tensor.device.type for tensor in tensors}
        namespace, name = func.name().split("::")
        if namespace == "aten" and not func.is_view and "empty" not in name and name != "_unsafe_view":
            self.names[name] += len(args[0]) if name == "_foreach_copy_" else 1
        return result


@pytest.mark.parametrize(("multiple", "products", "copies", "others"), [(64, 30, 127, 34), (1, 975, 0, 286)])
def test_a_step_on_a_gpu_never_waits_and_batches_unequal_cores(
    multiple: int, products: int, copies: int, others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without data raise an error for any value that the host reads, as a CUDA graph would."""
    monkeypatch.setattr("hpc_oialr.linalg.newton_schulz.GPU_MULTIPLE", multiple)
    with FakeTensorMode(), torch.device("cuda"):
        cores = [nn.Parameter(torch.empty(r, r)) for r in range(129, 193)]
        rest = [nn.Parameter(torch.empty(768)), nn.Parameter(torch.empty(768, 3, 16, 16))]
        for p in [*cores, *rest]:
            p.grad = torch.empty_like(p)
        groups = [{"params": cores, "cores": True}, {"params": rest[1:]}]
        optimizer = MuonAdamW([*groups, {"params": rest[:1], "algorithm": "adamw"}])
        # Torch's fused AdamW takes a tensor too, but not one without data.
        for group in optimizer.param_groups[:2]:
            group["lr"] = torch.empty(())
        factors = CoreLearningRate([optimizer])
        for core in cores:
            factors.set(core, 1.5)
        optimizer.step()
        with Launches() as launches:
            optimizer.step()
    assert launches.devices == {"cuda"}
    names = launches.names
    assert names["bmm"] + names["baddbmm"] == products
    # Into a batch and out of it; a core of 192 needs none out.
    assert names["_foreach_copy_"] + names["clone"] == copies
    assert names.total() - products - copies == others


@pytest.mark.parametrize("make", [RecipeAdamW, RecipeSGD])
def test_recipes_take_the_fused_kernels_on_a_gpu_for_plain_tensors(make: type[OptimizerConfig]) -> None:
    assert {group["fused"] for group in make().build(network()).param_groups} == {None}
    with FakeTensorMode(), torch.device("cuda"):
        model = nn.ParameterList([torch.empty(4, 4), torch.empty(4)])
        optimizer = make().build(model)
    assert {group["fused"] for group in optimizer.param_groups} == {True}
    assert optimizer.param_groups[0].get("capturable", True)
    assert RecipeAdamW(fused=False).build(model).param_groups[0]["fused"] is None
    assert RecipeAdamW(fused=True).build(network()).param_groups[0]["fused"] is True
