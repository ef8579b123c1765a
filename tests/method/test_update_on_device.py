"""What an update costs where the device is not the host: read-backs, and whose storage the factors are in."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits, muon_adamw
from hpc_oialr.errors import NonFiniteError
from hpc_oialr.linalg.gram_svd import Form, gram_svd
from hpc_oialr.linalg.svd import SVD, svd
from hpc_oialr.linalg.work_plan import Task, svd_rounds
from hpc_oialr.lowrank import low_rank_layers
from hpc_oialr.method import decompositions

IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
WAITING = {
    *(
        Tensor.cpu,
        Tensor.numpy,
        Tensor.tolist,
        Tensor.item,
        Tensor.equal,
        torch.equal,
        Tensor.nonzero,
        torch.nonzero,
    ),
    *(Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__),
}


class MadeUpDevice(TorchFunctionMode):
    """Parameters, and what is made of them, claim to be on a GPU; counts what would wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(isinstance(x, nn.Parameter) or hasattr(x, "on_device") for x in given)
        if func == IS_CUDA:
            return on_device
        kwargs.pop("driver", None)
        result = func(*args, **kwargs)
        if on_device and func in WAITING:
            self.waits.append(func.__name__)
            return result.detach().clone() if isinstance(result, Tensor) else result
        if on_device:
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    x.on_device = True  # type: ignore[attr-defined]
        return result


def an_update(layers: int, *, made_up: bool = True) -> tuple[list[str], list[Tensor]]:
    """What waited in an update of so many layers, and all values after it."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(layers + 1)))
    optimizer = muon_adamw(model)
    limits = RankLimits(at_conversion=0.75, max_drop=0.3)
    config = OIALRConfig(
        delay=1, frequency=1, rule=FixedFraction(0.25), limits=limits, layer_share_step=1.0, importance="weights"
    )
    oialr = OIALR(model, optimizer, config)
    for device in (nullcontext(), MadeUpDevice() if made_up else nullcontext()):
        model(torch.ones(2, 48)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with device:
            report = oialr.step()
    assert report is not None
    assert [(update.r_before, update.r) for update in report.layers] == [(40, 32)] * layers
    waits = device.waits if isinstance(device, MadeUpDevice) else []
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return waits, [*model.parameters(), *moments, *(update.singular_values for update in report.layers)]


def never_converges(*_: Any, **__: Any) -> Any:
    raise torch.linalg.LinAlgError("did not converge")


def test_an_update_reads_back_once_however_many_layers() -> None:
    # Whether all cores are finite, then the figures of all layers.
    (few, there), (many, _) = an_update(4), an_update(8)
    assert few == ["cpu", "cpu"]
    assert many == few
    with mock.patch.object(decompositions, "WINDOW_NUMBERS", 0):
        assert an_update(4)[0] == ["cpu"] * (1 + 4)
    _, here = an_update(4, made_up=False)
    torch.testing.assert_close(there[-4:], here[-4:])  # singular values: vectors may have other signs
    with mock.patch("hpc_oialr.linalg.svd.gram_svd", never_converges):
        waits, there = an_update(4)
    # The bases of the fall-back are checked, two of each core.
    assert [wait for wait in waits if wait != "__bool__"] == few
    assert waits.count("__bool__") == 2 * 4
    for a, b in zip(there, here, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layers", [2, 6])
def test_a_conversion_reads_back_once_however_many_layers(layers: int) -> None:
    oialr, device = dense(layers), MadeUpDevice()
    weights = [target.weight.detach().clone() for target in oialr.targets]
    with device:
        report = oialr.step()
    assert device.waits == ["cpu", "cpu"]
    assert report is not None
    for weight, layer, update in zip(weights, low_rank_layers(oialr.module).values(), report.layers, strict=True):
        torch.testing.assert_close(layer.U @ layer.S @ layer.Vh, weight, rtol=0, atol=1e-5)
        torch.testing.assert_close(update.singular_values, torch.linalg.svdvals(weight))


@pytest.mark.parametrize("always", [False, True])
def test_a_conversion_whose_first_svd_misses_the_bound_is_done_again(always: bool) -> None:
    """Missed in the batch only, or by the layer alone as well; the others are not computed twice."""
    oialr, device, calls = dense(4), MadeUpDevice(), []
    weights = [target.weight.detach().clone() for target in oialr.targets]

    def missed(A: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
        U, s, Vh = gram_svd(A, form=form)
        calls.append(len(A))
        if len(calls) == 1 or always:
            s[-1] = torch.nan
        return U, s, Vh

    with device, mock.patch("hpc_oialr.linalg.svd.gram_svd", missed):
        oialr.step()
    assert calls == ([4, 1, 1] if always else [4, 1])
    for weight, layer in zip(weights, low_rank_layers(oialr.module).values(), strict=True):
        torch.testing.assert_close(layer.U @ layer.S @ layer.Vh, weight, rtol=0, atol=1e-5)


def dense(layers: int) -> OIALR:
    """Before a step that converts everything at full rank."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(48, 48) for _ in range(layers + 1)))
    return OIALR(model, torch.optim.AdamW(model.parameters()), OIALRConfig(delay=1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 48), nn.Linear(48, 4)
    )


def trained(steps: int, *, averaged: bool = False) -> tuple[OIALR, AveragedModel | None]:
    model = network()
    average = AveragedModel(model) if averaged else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    limits = RankLimits(at_conversion=0.75, max_drop=0.3)
    config = OIALRConfig(delay=2, frequency=2, rule=FixedFraction(0.25), limits=limits, layer_share_step=1.0)
    oialr = OIALR(model, optimizer, config, averages=[average] if average else [])
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        oialr.model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(model)
        oialr.step()
    return oialr, average


def in_batches(works: Any, processes: int, **_: Any) -> list[list[Task]]:
    """As a GPU gets them: several layers of one shape a task."""
    rounds = svd_rounds(works, processes)
    assert max(len(task.layers) for tasks in rounds for task in tasks) > 1
    return rounds


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("steps", [2, 4])
def test_factors_and_moments_own_their_storage(steps: int, batched: bool) -> None:
    if batched:
        with mock.patch("hpc_oialr.method.svd_scheduler.svd_rounds", in_batches):
            oialr, average = trained(steps, averaged=True)
    else:
        oialr, average = trained(steps, averaged=True)
    assert len(set(oialr.r.values())) > 1
    assert average is not None
    layers = [*low_rank_layers(oialr.module).values(), *low_rank_layers(average).values()]
    held = [factor for layer in layers for factor in layer.factors]
    held += [value for state in oialr.optimizer.state.values() for value in state.values()]
    assert len(layers) == 6
    for tensor in held:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert len({tensor.data_ptr() for tensor in held}) == len(held)


def test_a_report_keeps_no_more_than_the_spectra() -> None:
    oialr, _ = trained(3)
    oialr.module.zero_grad()
    report = oialr.step()
    assert report is not None
    assert report.kind == "update"
    for update in report.layers:
        assert update.singular_values.untyped_storage().nbytes() == 4 * update.r_before


def test_a_core_whose_first_svd_fails_goes_through_the_other_drivers() -> None:
    def first_fails(A: Tensor, *, name: str = "matrix", careful: bool = True) -> SVD:
        found = svd(A, name=name, careful=careful)
        if name == "2" and not careful:
            found.U[1, 1] = torch.nan
        return found

    plain, _ = trained(6)
    calls: list[tuple[str, bool]] = []

    def counted(A: Tensor, *, name: str = "matrix", careful: bool = True) -> SVD:
        calls.append((name, careful))
        return first_fails(A, name=name, careful=careful)

    with mock.patch("hpc_oialr.linalg.svd.svd", counted):
        struck, _ = trained(6)
    assert calls.count(("2", False)) == calls.count(("2", True)) - 1 == 2  # two updates, and the conversion
    for a, b in zip(plain.module.parameters(), struck.module.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_core_without_any_svd_stops_the_run_with_its_name() -> None:
    oialr, _ = trained(3)
    twin = copy.deepcopy(oialr.module.state_dict())
    torch_svd = torch.linalg.svd

    def never(*args: Any, **kwargs: Any) -> Any:
        U, s, Vh = torch_svd(*args, **kwargs)
        return U, s * torch.inf, Vh

    with (
        mock.patch("torch.linalg.svd", never),
        pytest.raises(NonFiniteError, match="no SVD of [02] .* converged"),
    ):
        oialr.step()
    assert all(torch.equal(twin[name], value) for name, value in oialr.module.state_dict().items())
