"""Settings of the process during a run, restored at its end: kernels, threads, environment, log file."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from hpc_oialr.distributed import World
from hpc_oialr.distributed.environment import usable_cores
from hpc_oialr.linalg.arithmetic import tf32_products
from hpc_oialr.redaction import MaskingFormatter
from hpc_oialr.torch_compat import recompile_limit

log = logging.getLogger(__name__)


@contextmanager
def process_settings(world: World, *, tf32: bool = True, compiled: bool = False) -> Iterator[None]:
    """On CPUs deterministic kernels, and a node's cores divided among its ranks; on CUDA TF32 or not.

    With ``compiled``, torch.compile may make a graph for every r. Everything is restored at the end, also what
    libraries change: environment variables, filters of warnings, DeepSpeed's log level.
    """
    deepspeed, environment = logging.getLogger("DeepSpeed"), dict(os.environ)
    with ExitStack() as stack, warnings.catch_warnings():
        stack.callback(_restore_environment, environment)
        # The steps before a CUDA graph is captured are meant to be without one.
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        stack.callback(deepspeed.setLevel, deepspeed.level)
        if compiled:
            # Every set of shapes is compiled once; by default torch gives up on a function after 8.
            stack.enter_context(recompile_limit(64))
        if world.device.type != "cpu":
            stack.enter_context(tf32_products(tf32))
            yield
            return
        stack.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic: Any = torch.utils.deterministic
        fill = deterministic.fill_uninitialized_memory
        stack.callback(setattr, deterministic, "fill_uninitialized_memory", fill)
        # Filling fresh memory only helps to find reads of it, and costs time.
        deterministic.fill_uninitialized_memory = False
        cores, threads = usable_cores(), torch.get_num_threads()
        # A launcher or OMP_NUM_THREADS that gives a process less than the whole node is left alone.
        if world.local_size > 1 and threads >= cores:
            stack.callback(torch.set_num_threads, threads)
            torch.set_num_threads(max(1, cores // world.local_size))
        yield


def _restore_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@contextmanager
def log_into(path: Path) -> Iterator[None]:
    """Write this rank's log into a file; warns if that cannot be opened."""
    logger = logging.getLogger("hpc_oialr")
    before = logger.level
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        handler: logging.Handler = _LogFile(path)
    except OSError as error:
        log.warning("%s cannot be written (%s): this process keeps no log.", path, error)
        handler = logging.NullHandler()
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
        handler.close()


class _LogFile(logging.FileHandler):
    """Silent if the disk is full, which metrics and checkpoints report; logging would print tracebacks."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass

    def close(self) -> None:
        # A last flush without room must hide no other error.
        with suppress(OSError):
            super().close()
