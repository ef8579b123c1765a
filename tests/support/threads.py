"""Several "processes" as threads of one, over the real communicator: for tests with many small cases."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hpc_oialr.linalg.communicator import Communicator

PATIENCE_S = 60.0


class ThreadCommunicator(Communicator):
    """Messages are copies in queues, one for each ordered pair of threads."""

    def __init__(self, rank: int, size: int, mail: dict[tuple[int, int], queue.Queue[Tensor | None]]) -> None:
        super().__init__(rank, size)
        self.mail = mail

    def _send(self, tensor: Tensor, to: int) -> None:
        self.mail[self.rank, to].put(tensor.clone())

    def _receive(self, out: Tensor, source: int) -> None:
        tensor = self.mail[source, self.rank].get(timeout=PATIENCE_S)
        if tensor is None:
            raise ConnectionAbortedError(f"thread {source} has failed")
        assert (tensor.shape, tensor.dtype) == (out.shape, out.dtype)
        out.copy_(tensor)

    def _swap(self, tensor: Tensor, to: int, out: Tensor, source: int) -> None:
        self._send(tensor, to)
        self._receive(out, source)


def run_threads(size: int, fn: Callable[[ThreadCommunicator], Any]) -> list[Any]:
    """``fn(communicator)`` in each thread: what they return, in order of rank; the first error is raised.

    Where every thread raises an error of its own, rank 0's is the first. A message left unread is an error.
    """
    mail: dict[tuple[int, int], queue.Queue[Tensor | None]] = {
        (a, b): queue.Queue() for a in range(size) for b in range(size)
    }
    results: list[Any] = [None] * size
    errors: list[BaseException | None] = [None] * size

    def work(rank: int) -> None:
        torch.set_num_threads(1)  # OpenMP keeps the number for each thread
        try:
            results[rank] = fn(ThreadCommunicator(rank, size, mail))
        except BaseException as error:
            errors[rank] = error
            for other in range(size):
                mail[rank, other].put(None)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    before = torch.get_num_threads()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    raised = [error for error in errors if error is not None]
    own = [error for error in raised if not isinstance(error, ConnectionAbortedError)]
    if raised:
        raise (own or raised)[0]
    assert all(box.empty() for box in mail.values()), "a message was never received"
    return results


def outcomes(size: int, fn: Callable[[ThreadCommunicator], Any]) -> list[str]:
    """Each thread's error as ``"Type: message"``, or "ok"."""

    def told(comm: ThreadCommunicator) -> str:
        try:
            fn(comm)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "ok"

    return run_threads(size, told)
