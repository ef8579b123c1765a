"""A boolean reduced over all ranks, asynchronously: the result of one step is read at the next."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from hpc_oialr.distributed.world import Pending, World


class AsyncFlagReduce:
    """Whether any process says yes: asked at one step, known at the next.

    A step's words are summed up while the next step computes, over gloo on the CPU: nothing waits for the
    GPU, and the answer is there when it is read, unless a process is more than a step behind. All read the
    same answer at the same step. One process has its answer at once.

    Parameters
    ----------
    world
        The processes.

    Notes
    -----
    Sends one 32-bit number a step.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        on_gpu = world.group is not None and "gloo" not in str(dist.get_backend_config(world.group))
        # The CPU, unless the group was made for GPUs only.
        self._device = world.device if on_gpu else torch.device("cpu")
        self._under_way: tuple[Tensor, Pending] | None = None

    def exchange(self, yes: bool) -> bool:
        """Give this step's word and take the answer to the step's before; a collective call.

        Raises
        ------
        ProcessLostError
            If another process has died or does not answer within the timeout.
        """
        if self.world.size == 1:
            return yes
        answer = self.settle()
        word = torch.tensor([int(yes)], dtype=torch.int32, device=self._device)
        pending = self.world.start_all_reduce(word, op="max")
        assert pending is not None
        self._under_way = word, pending
        return answer

    def settle(self) -> bool:
        """The answer that is still under way; nothing is after this."""
        if self._under_way is None:
            return False
        word, pending = self._under_way
        self._under_way = None
        pending.wait()
        return bool(word.item())
