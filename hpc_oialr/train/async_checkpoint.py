"""Checkpoints written beside the training: copied to the host's memory, then to the disk by a thread."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor

from hpc_oialr.distributed import World
from hpc_oialr.errors import FolderLostError
from hpc_oialr.torch_compat import STAGERS_SERVE_ONCE
from hpc_oialr.train.checkpoint_store import CheckpointStore

# Under these names every rank has the same tensors, or its shards of them.
_SHARED = ("model.", "optimizer.")


class AsyncCheckpoints:
    """Writes checkpoints into ``store``, one at a time; :meth:`save` returns as soon as the state is copied.

    Takes the host's memory for a copy of what this rank writes, which is its shards and its share of the tensors that all
    ranks have: pinned for a GPU and, since torch 2.13, kept until :meth:`close`. The ranks' threads talk over a gloo
    group of their own, since messages of the training come in between, in another place on each rank. Making one,
    :meth:`save` and :meth:`wait` are collective calls.
    """

    def __init__(self, store: CheckpointStore, world: World) -> None:
        own = replace(world, device=torch.device("cpu"))
        if world.size > 1:
            ranks = dist.get_process_group_ranks(world.group)
            own = own.within(dist.new_group(ranks, timedelta(seconds=world.timeout_s), backend="gloo"))
        self._store = CheckpointStore(store.folder, own, keep=store.keep, lost=store.lost)
        on_gpu = world.device.type == "cuda"
        self._options = StagingOptions(
            use_pinned_memory=on_gpu,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=on_gpu,
        )
        self._stager = DefaultStager(self._options)
        # At the interpreter's end Python waits for its thread.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._written: Future[float] | None = None
        self.step = 0  # of the last one begun

    @property
    def busy(self) -> bool:
        """Whether :meth:`wait` was not called since the last :meth:`save`."""
        return self._written is not None

    @property
    def done(self) -> bool:
        """Whether :meth:`wait` would return at once: the checkpoint is there, or has failed on this rank."""
        return self._written is not None and self._written.done()

    @property
    def lost(self) -> bool:
        """Whether it has failed since the run's folder is gone."""
        return self.done and isinstance(self._written and self._written.exception(), FolderLostError)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """As :meth:`CheckpointStore.save`, whose errors :meth:`wait` raises."""
        assert not self.busy
        copies = self._stager.stage(own_share(tensors, self._store.world))
        if STAGERS_SERVE_ONCE:
            self._stager = DefaultStager(self._options)
        self._written = self._thread.submit(self._write, step, copies, copy.deepcopy(dict(state)))
        self.step = step

    def _write(self, step: int, copies: Any, state: dict[str, Any]) -> float:
        start = time.perf_counter()
        self._store.save(step, copies, state)
        return time.perf_counter() - start

    def wait(self) -> float:
        """Wait until the last checkpoint is on disk; returns the seconds that writing took, or raises its error."""
        assert self._written is not None
        written, self._written = self._written, None
        return written.result()

    def close(self) -> None:
        """Let the thread finish, whatever becomes of it, and free the copies."""
        self._thread.shutdown(wait=True)
        self._stager.close()


def own_share(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """What one rank writes: its shards, what only it has, and its share, by size, of what all ranks have."""
    loads, mine = [0] * world.size, {}
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].nbytes, item[0])):
        rank = world.rank
        if name.startswith(_SHARED) and not isinstance(tensor, DTensor):
            rank = loads.index(min(loads))
            loads[rank] += tensor.nbytes
        if rank == world.rank:
            mine[name] = tensor
    return mine
