"""Is anything but reverse-mode autograd looking at the forward pass right now?

Two private names of torch are read here and nowhere else. Should one of them go, the answer is the cautious one.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a compiler, exporter, tracer, ``torch.func`` transform or forward-mode derivative is active.

    Kernels that only reverse-mode autograd knows must not be called then.
    """
    # First, since torch.compile cannot look behind the others.
    if torch.compiler.is_compiling():
        return True
    return (
        torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        or getattr(forward_ad, "_current_level", 0) >= 0
        or getattr(torch._C, "_are_functorch_transforms_active", _unknown)()
    )


def _unknown() -> bool:
    return True
