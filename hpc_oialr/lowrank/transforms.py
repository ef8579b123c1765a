"""Is anything but reverse-mode autograd looking at the forward pass right now?"""

from __future__ import annotations

import torch

from hpc_oialr.torch_compat import transforms_active


def is_transformed() -> bool:
    """Whether a compiler, exporter, tracer, ``torch.func`` transform or forward-mode derivative is active.

    Kernels that only reverse-mode autograd knows must not be called then.
    """
    # First, since torch.compile cannot look behind the others.
    if torch.compiler.is_compiling():
        return True
    return torch.jit.is_tracing() or transforms_active()  # type: ignore[attr-defined, no-untyped-call]
