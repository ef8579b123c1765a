"""What every engine offers to the controller and the trainer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager

from torch import nn

from hpc_oialr.processes import World


class Engine(ABC):
    """Wraps a module so that its processes train one model.

    Attributes
    ----------
    world
        The processes that share the gradients.
    """

    world: World

    @abstractmethod
    def wrap(self, module: nn.Module) -> nn.Module:
        """What to call in the loop; all processes begin with process 0's parameters and buffers."""

    @abstractmethod
    def rewrap(self, module: nn.Module) -> nn.Module:
        """The same after parameters were replaced or frozen; nothing is broadcast.

        Parameters must be equal on all processes. The wrapper before it must not be called again.
        """

    @abstractmethod
    def unwrap(self, model: nn.Module) -> nn.Module:
        """The module inside what :meth:`wrap` returned."""

    @abstractmethod
    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Context in which backward passes leave gradients local, to be summed by the next one outside."""
