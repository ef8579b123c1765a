"""The method's arithmetic does not depend on what is switched on around it, and puts everything back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits, merge, muon_adamw
from hpc_oialr.distributed import World
from hpc_oialr.linalg.arithmetic import exact_arithmetic, full_precision
from hpc_oialr.lowrank import convert, low_rank_layers
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.process_settings import process_settings

CUDA, CPU = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


@contextmanager
def older_switch(precision: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def newer_switches(**chosen: str) -> Iterator[None]:
    places = {"all": torch.backends, "cuda": CUDA, "cpu": CPU}
    for name, precision in chosen.items():
        places[name].fp32_precision = precision
    try:
        yield
    finally:
        for name in chosen:
            places[name].fp32_precision = "none"


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "older switch, TF32": lambda: older_switch("high"),
    "older switch, bf16": lambda: older_switch("medium"),
    "CPU bf16": lambda: newer_switches(cpu="bf16"),
    "CUDA TF32": lambda: newer_switches(cuda="tf32"),
    "all in TF32": lambda: newer_switches(all="tf32"),
    "all in bf16, CUDA in TF32": lambda: newer_switches(all="bf16", cuda="tf32"),
    "inference mode": torch.inference_mode,
    "meta device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


def settings() -> tuple[object, ...]:
    places = (torch.backends, CUDA, CPU, torch.backends.cudnn, torch.backends.cudnn.conv)
    modes = (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    defaults = (torch.get_default_dtype(), torch.get_default_device())
    return (*(place.fp32_precision for place in places), *modes, *defaults)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))


def trained(surrounding: Callable[[], AbstractContextManager[object]]) -> tuple[list[Tensor], OIALR]:
    """Measured, converted, cut and merged inside ``surrounding``; all else is outside."""
    model, x = network(), torch.randn(32, 48, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    limits = RankLimits(max_drop=0.3, round_to=1)
    config = OIALRConfig(
        delay=4,
        frequency=2,
        stability_frequency=2,
        rule=FixedFraction(0.25),
        limits=limits,
        layer_share_step=1.0,
    )
    oialr = OIALR(model, optimizer, config)
    found: list[Tensor] = []
    for _ in range(8):
        oialr.model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with surrounding():
            before = settings()
            report = oialr.step()
            assert settings() == before
        for layer in report.layers if report else ():
            figures = (
                layer.stability,
                layer.subspace_angle_U,
                layer.orthogonality_error_Vh,
                layer.r_factor_distance,
            )
            found += [layer.singular_values, torch.tensor([x or 0.0 for x in figures], dtype=torch.float64)]
    with surrounding():
        dense = merge(model)
        found.append(model[2].weight.detach())
    state = [value for p in model.parameters() for value in optimizer.state.get(p, {}).values()]
    return [*found, *dense.parameters(), *model.parameters(), *state], oialr


@pytest.fixture(scope="module")
def plain() -> list[Tensor]:
    return trained(lambda: torch.no_grad())[0]


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_same_bits_wherever_it_is_called(name: str, plain: list[Tensor]) -> None:
    there, oialr = trained(SURROUNDINGS[name])
    assert oialr.r == {"0": 24, "2": 32}
    assert len(there) == len(plain) > 40
    for a, b in zip(plain, there, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
        assert not b.is_inference() or not isinstance(b, nn.Parameter)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_empty_layers_of_a_checkpoint_are_ordinary_parameters(name: str) -> None:
    model = network()
    with SURROUNDINGS[name]():
        oialr = OIALR(model, torch.optim.AdamW(model.parameters()), OIALRConfig())
        oialr.load_state_dict({"t": 9, "updates": 2, "r": {"0": 3, "2": 5}, "streaks": {}})
    for layer in low_rank_layers(model).values():
        kinds = {(p.dtype, p.device.type, p.is_inference()) for p in layer.factors}
        assert kinds == {(torch.float32, "cpu", False)}
        assert [p.requires_grad for p in layer.factors] == [False, True, False]


def test_a_model_made_in_inference_mode_gets_factors_that_can_be_trained() -> None:
    with torch.inference_mode():
        model = network()
        convert(model, fraction=0.5)
    layers = low_rank_layers(model)
    assert len(layers) == 2
    assert not any(p.is_inference() for layer in layers.values() for p in layer.factors)
    layers["2"](torch.randn(2, 64)).sum().backward()
    assert layers["2"].S.grad is not None
    with torch.inference_mode():
        assert not merge(model)[2].weight.is_inference()


def test_a_step_of_muon_inside_autocast_is_the_same() -> None:
    def stepped(surrounding: AbstractContextManager[object]) -> list[Tensor]:
        model = network()
        optimizer = muon_adamw(model, lr=0.1, newton_schulz_dtype=torch.float32)
        for _ in range(3):
            model(torch.ones(4, 48)).square().sum().backward()
            with surrounding:
                optimizer.step()
        return list(model.parameters())

    for a, b in zip(stepped(torch.no_grad()), stepped(torch.autocast("cpu", torch.bfloat16)), strict=True):
        assert torch.equal(a, b)


def test_products_are_ieee_inside_and_the_precision_of_all_comes_back() -> None:
    A = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    exact = A.double() @ A.double()
    with newer_switches(all="bf16"), torch.autocast("cpu", torch.bfloat16):
        with full_precision():
            assert CPU.fp32_precision == CUDA.fp32_precision == "ieee"
            S = A.clone().requires_grad_()
            product = S @ S
            assert product.requires_grad
            assert (product - exact).abs().max() < 1e-3
        assert (A @ A).dtype == torch.bfloat16
        torch.backends.fp32_precision = "none"
        assert CPU.fp32_precision == "none"


@exact_arithmetic()
def fails() -> None:
    assert torch.zeros(1).dtype == torch.float32
    assert torch.zeros(1).device.type == "cpu"
    raise ZeroDivisionError


def test_a_setting_comes_back_after_an_error() -> None:
    with newer_switches(cpu="bf16", cuda="tf32"), torch.device("meta"), default_dtype(torch.float64):
        before = settings()
        with pytest.raises(ZeroDivisionError):
            fails()
        assert settings() == before


@pytest.mark.parametrize("setting", [None, "true", "false"])
def test_a_run_on_cuda_allows_tf32_unless_told_otherwise(setting: str | None) -> None:
    given = [] if setting is None else ["--train.tf32", setting]
    train = load_config("text_gpt", given).config.train
    allowed = "tf32" if setting != "false" else "ieee"
    on_cuda = cast(World, SimpleNamespace(device=torch.device("cuda")))
    before = CUDA.fp32_precision, torch.backends.cudnn.allow_tf32
    with process_settings(on_cuda, tf32=train.tf32):
        assert CUDA.fp32_precision in (allowed, "none" if allowed == "ieee" else allowed)
        assert CUDA.allow_tf32 is torch.backends.cudnn.allow_tf32 is (allowed == "tf32")
        with exact_arithmetic():
            assert CUDA.fp32_precision != "tf32"
            assert not CUDA.allow_tf32
        assert CUDA.allow_tf32 is (allowed == "tf32")
    assert (CUDA.fp32_precision, torch.backends.cudnn.allow_tf32) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_cast_to_another_dtype_is_merged_in_it(dtype: torch.dtype) -> None:
    model = network()
    convert(model, fraction=0.5)
    expected = {name: layer.merged_weight().to(dtype) for name, layer in low_rank_layers(model).items()}
    dense = merge(model.to(dtype))
    assert {p.dtype for p in dense.parameters()} == {dtype}
    assert dense(torch.ones(2, 48, dtype=dtype)).dtype == dtype
    for name, weight in expected.items():
        torch.testing.assert_close(dense.get_submodule(name).weight, weight, rtol=2e-2, atol=2e-2)
