"""Computing on casts of a model's parameters, which stay what is trained and stored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from hpc_oialr.lowrank.base import LowRankWeight


@contextmanager
def cast_parameters(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """While active, ``module`` and its wrappers compute on its floating-point parameters in ``dtype``; changed in place.

    Gradients flow through the casts into the parameters, in the parameters' dtype. The backward pass belongs inside:
    recomputed activations read the casts again. Each parameter is cast once, also a tied one; frozen ``U`` and ``Vh``
    only after they have changed (:class:`hpc_oialr.lowrank.base.AutocastCopies`). Buffers, and parameters of batch
    norms, keep their dtype: torch takes statistics and weights in fp32 beside inputs in bf16.

    Costs one kernel a trained parameter and ``dtype``'s bytes for each of its numbers, until the end of the context.
    """
    casts: dict[int, Tensor] = {}
    changed: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    for part in module.modules():
        if isinstance(part, _NormBase):
            continue
        if isinstance(part, LowRankWeight):
            # Its own check of every forward pass needs the parameters.
            part.check_use()
            if part.autocast_copies is not None:
                copies = part.autocast_copies.of(part.U, part.Vh, dtype)
                casts |= zip((id(part.U), id(part.Vh)), copies, strict=True)
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                changed.append((part._parameters, name, parameter))
    try:
        for parameters, name, parameter in changed:
            cast = casts[id(parameter)] = casts.get(id(parameter), parameter).to(dtype)
            parameters[name] = cast  # type: ignore[assignment]  # as in torch.func.functional_call
        yield
    finally:
        for parameters, name, parameter in changed:
            parameters[name] = parameter
