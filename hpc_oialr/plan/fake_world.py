"""One rank of a large world whose other ranks do not exist, and tensors without data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_oialr import torch_compat
from hpc_oialr.distributed import World
from hpc_oialr.distributed.world import Op, Pending
from hpc_oialr.engines import Engine
from hpc_oialr.errors import WorldError
from hpc_oialr.linalg.communicator import TorchCommunicator
from hpc_oialr.linalg.tsqr import BlockQR
from hpc_oialr.lowrank import TargetWeight
from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.method import basis, decompositions, loading
from hpc_oialr.torch_compat import FakeTensorMode, TorchDispatchMode


class FakeWorld(World):
    """A world with one real rank, over torch's fake process group.

    What another rank would have sent is zero; values that are equal on all ranks from the start stay.
    """

    def broadcast(self, tensor: Tensor, src: int) -> Pending | None:
        """Zeros from other ranks."""
        if src != self.rank:
            tensor.zero_()
        return super().broadcast(tensor, src)

    def start_all_reduce(self, tensor: Tensor, op: Op = "sum") -> Pending | None:
        """In a maximum the other ranks contribute 0."""
        pending = super().start_all_reduce(tensor, op)
        if op == "max":
            tensor.clamp_(min=0)
        return pending

    def share(self, tensors: Any, src: int = 0) -> None:
        """Sends as usual; values stay."""
        for tensor in tensors:
            super().broadcast(tensor, src)


@contextmanager
def fake_world(rank: int, size: int) -> Iterator[World]:
    """A world of ``size`` ranks, of which only ``rank`` exists; on the CPU."""
    if size == 1:
        yield World(device=torch.device("cpu"))
        return
    if dist.is_initialized():
        raise WorldError(
            f"a process group of {dist.get_world_size()} processes exists, and a plan makes a fake one. Start oialr "
            "plan as one process, without torchrun, srun or mpirun."
        )
    # The import of FakeStore registers the backend "fake".
    dist.init_process_group("fake", rank=rank, world_size=size, store=torch_compat.FakeStore())
    try:
        yield FakeWorld(rank, size, 0, 1, torch.device("cpu"), "adopted", dist.group.WORLD, timeout_s=60.0)
    finally:
        dist.destroy_process_group()
        # DTensor caches operations with the groups of this world.
        torch_compat.forget_groups()


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Context in which tensors have shapes, dtypes and lifetimes, but no data.

    Values that code reads pass its checks: ``all`` gives True, every other flag False; integers are 0, other numbers
    1. Code that depends on values in another way gives wrong results.
    """
    from transformers.utils import import_utils

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        _MadeUpValues(),  # type: ignore[no-untyped-call]
        # For fake tensors transformers makes masks that attention does not need.
        patch.object(import_utils, "is_fake_tensor", lambda _: False),
        patch.object(loading, "require_values", lambda _: None),
        warnings.catch_warnings(),
    ):
        # Cached casts of bases are looked up by their address; fake ones all have address 0.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        yield


class _MadeUpValues(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            tensor = args[0]
            if tensor.dtype == torch.bool:
                return getattr(tensor, "all_is_well", False)
            return 1.0 if tensor.is_floating_point() else 0
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.all, torch.ops.aten._is_all_true):
            result.all_is_well = True
        return result


@contextmanager
def fake_collectives() -> Iterator[None]:
    """Context with results for the messages that torch's fake process group does not support.

    Messages of TSQR carry sizes, so its results are made up in the right shapes. Other point-to-point messages are
    zero.
    """
    with (
        patch.object(dist, "all_to_all_single", _exchange_zeros),
        patch.object(TorchCommunicator, "_receive", lambda self, out, source: out.zero_()),
        patch.object(decompositions, "split_svd", _fake_svd),
        # As if the columns were orthonormal.
        patch.object(basis, "tsqr", lambda A, group=None: BlockQR(A, torch.eye(A.shape[1], dtype=A.dtype))),
        # Bases, or shards of them, that another rank would have sent are zero here.
        patch.object(LowRankWeight, "require_orthonormal", lambda *_: None),
        patch.object(LowRankWeight, "_check_bases", lambda _: None),
    ):
        yield


def _exchange_zeros(
    out: Tensor, given: Tensor, out_sizes: Sequence[int], given_sizes: Sequence[int], group: Any = None
) -> None:
    assert len(out_sizes) == len(given_sizes) == dist.get_world_size(group)
    assert (sum(out_sizes), sum(given_sizes)) == (out.numel(), given.numel())
    out.zero_()


def _fake_svd(target: TargetWeight, engine: Engine) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows and columns of two identities, and singular values from 2 down to 1."""
    engine.gather(target)
    (m, n), k, layout = target.shape, target.k, engine.layout
    U, Vh = torch.eye(m, k)[layout.own_rows(m)], torch.eye(k, n)[:, layout.own_columns(n)]
    return U, torch.linspace(2.0, 1.0, k), Vh
