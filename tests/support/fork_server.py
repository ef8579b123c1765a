"""The server that tests' processes are forked from: what takes seconds to import is imported there, once."""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

_LOADED = [
    "pytest",
    "hypothesis",
    "torch",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "hpc_oialr.cli.main",
    "hpc_oialr.train.run",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.vit.modeling_vit",
]


def fork_context() -> ForkServerContext:
    """A multiprocessing context whose processes start in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_LOADED)
    return context
