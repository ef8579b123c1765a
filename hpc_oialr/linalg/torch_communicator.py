"""A communicator over a torch.distributed process group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor

from hpc_oialr.errors import ProcessLostError
from hpc_oialr.linalg.communicator import Communicator


class TorchCommunicator(Communicator):
    """gloo for CPU tensors, NCCL for CUDA tensors, whatever the group was made with.

    Raises
    ------
    ProcessLostError
        From every call, if the other process has died or does not answer within the group's timeout.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group))
        self._group = group

    def _send(self, tensor: Tensor, to: int) -> None:
        with self._reported(f"sending to process {to}"):
            dist.send(tensor, group=self._group, group_dst=to)

    def _receive(self, out: Tensor, source: int) -> None:
        with self._reported(f"receiving from process {source}"):
            dist.recv(out, group=self._group, group_src=source)

    def _swap(self, tensor: Tensor, to: int, out: Tensor, source: int) -> None:
        with self._reported(f"an exchange with processes {to} and {source}"):
            # NCCL deadlocks on two plain calls: both directions must be enqueued as one batch.
            ops = [
                dist.P2POp(dist.isend, tensor, group=self._group, group_peer=to),
                dist.P2POp(dist.irecv, out, group=self._group, group_peer=source),
            ]
            for work in dist.batch_isend_irecv(ops):
                work.wait()

    @contextlib.contextmanager
    def _reported(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise ProcessLostError(
                f"process {self.rank} of {self.size}: {what} failed; every process of the group must call the "
                f"same function within the timeout. Another one has died or left: see its log. ({error})"
            ) from error
