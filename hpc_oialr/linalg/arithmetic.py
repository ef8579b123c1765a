"""Precision of the method, whatever autocast, TF32 or inference mode the caller has switched on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


@contextmanager
def without_autocast() -> Iterator[None]:
    """Autocast off on every device. Also a decorator; may be nested."""
    with ExitStack() as stack:
        for device in AUTOCAST_DEVICES:
            # Only where it is on: torch warns of a disabled autocast too, on a machine without that device.
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def full_precision() -> Iterator[None]:
    """Autocast off, and products of fp32 matrices in IEEE fp32: no TF32, no bf16.

    Gradients are recorded as before. Also a decorator; may be nested; everything is restored at the end.
    """
    with without_autocast(), _ieee_products():
        yield


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """:func:`full_precision` without gradients, in normal mode, with torch's own default dtype and device.

    Conversions, updates, stability measurements and merges run in it. So they give the same values and ordinary tensors
    inside autocast, under TF32, in ``torch.inference_mode()``, and inside ``with torch.device(...)``. Also a decorator;
    may be nested; everything is restored at the end.
    """
    with without_autocast(), _ieee_products(), torch.no_grad(), ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Whether CUDA computes fp32 products and convolutions in TF32 meanwhile; never in :func:`exact_arithmetic`."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    # torch refuses to read the older switch of products while only the newer one is set.
    before, convolutions = matmul.fp32_precision, cudnn.allow_tf32
    _allow_tf32(allowed, allowed)
    try:
        yield
    finally:
        _allow_tf32(before == "tf32", convolutions)
        matmul.fp32_precision = before


def _allow_tf32(products: bool, convolutions: bool) -> None:
    with warnings.catch_warnings():
        # Some versions of torch name the newer settings here, but torch.compile and cuBLASLt still read the older ones,
        # and these set both.
        warnings.simplefilter("ignore")
        torch.backends.cuda.matmul.allow_tf32 = products
        torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def _ieee_products() -> Iterator[None]:
    """The settings of the CUDA and the CPU library for fp32 products; convolutions are no part of the method."""
    libraries: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [library.fp32_precision for library in libraries]
    if all(precision in ("none", "ieee") for precision in before):
        yield
        return
    for library in libraries:
        library.fp32_precision = "ieee"
    # torch refuses products while its older switch says something else than these; it can be read only now.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        older = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for library, precision in zip(libraries, before, strict=True):
            # Most take theirs from a setting for all operations, which "none" lets through again.
            library.fp32_precision = "none"
            if library.fp32_precision != precision:
                library.fp32_precision = precision
