"""Settings of the whole process that a run needs, made in one place and taken back at its end."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from hpc_oialr.distributed import World
from hpc_oialr.distributed.environment import usable_cores
from hpc_oialr.linalg.arithmetic import tf32_products
from hpc_oialr.torch_compat import recompile_limit

# Every set of shapes is compiled once; torch gives a function up after 8.
_RECOMPILES = 64


@contextmanager
def process_settings(world: World, *, tf32: bool = True, compiled: bool = False) -> Iterator[None]:
    """On CPUs reproducible kernels, and cores shared among the processes of a node; on CUDA TF32 or not.

    At the end all is as before, also what libraries imported meanwhile have changed: environment variables, filters of
    warnings, DeepSpeed's log level.

    Parameters
    ----------
    tf32
        Whether CUDA may multiply fp32 matrices in TF32.
    compiled
        Whether torch.compile must make a graph for every r.
    """
    with ExitStack() as stack, warnings.catch_warnings():
        stack.callback(_restore_environment, dict(os.environ))
        stack.callback(logging.getLogger("DeepSpeed").setLevel, logging.getLogger("DeepSpeed").level)
        if compiled:
            stack.enter_context(recompile_limit(_RECOMPILES))
        if world.device.type == "cpu":
            _reproducible(stack)
            _share_cores(stack, world)
        else:
            stack.enter_context(tf32_products(tf32))
        yield


def _reproducible(stack: ExitStack) -> None:
    mode = torch.get_deterministic_debug_mode()
    stack.callback(torch.set_deterministic_debug_mode, mode)
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic: Any = torch.utils.deterministic
    stack.callback(
        setattr, deterministic, "fill_uninitialized_memory", deterministic.fill_uninitialized_memory
    )
    # Filling fresh memory only helps to find reads of it, and costs time.
    deterministic.fill_uninitialized_memory = False


def _share_cores(stack: ExitStack, world: World) -> None:
    cores, threads = usable_cores(), torch.get_num_threads()
    # A launcher or OMP_NUM_THREADS that gives a process less than the whole node is left alone.
    if world.local_size > 1 and threads >= cores:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(max(1, cores // world.local_size))


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
