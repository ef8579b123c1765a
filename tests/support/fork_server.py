"""The server that tests' processes are forked from: what takes seconds to import is imported there, once."""

from __future__ import annotations

import gc
import multiprocessing
import warnings
from multiprocessing.context import ForkServerContext

import torch

_LOADED = [
    "support.without_garbage",
    "pytest",
    "hypothesis",
    "torch",
    "torch._dynamo",
    "torch._inductor.compile_fx",
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


def settle() -> None:
    """What each process does first: one thread, warnings as errors, no search for garbage in what it has inherited."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    gc.freeze()
    gc.enable()
