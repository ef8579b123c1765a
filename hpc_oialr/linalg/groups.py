"""The communicator for whatever names a group of processes."""

from __future__ import annotations

import torch.distributed as dist

from hpc_oialr.linalg.communicator import Communicator, Group, SingleCommunicator
from hpc_oialr.linalg.mpi_communicator import MPICommunicator
from hpc_oialr.linalg.torch_communicator import TorchCommunicator


def communicator(group: Group) -> Communicator:
    """The communicator for whatever names a group.

    Parameters
    ----------
    group
        None (one process), a :class:`Communicator`, a ``torch.distributed`` process group, or an mpi4py
        communicator.

    Raises
    ------
    TypeError
        For anything else.

    Examples
    --------
    >>> communicator(None).size
    1
    """
    if isinstance(group, Communicator):
        return group
    if group is None:
        return SingleCommunicator()
    if isinstance(group, dist.ProcessGroup):
        return TorchCommunicator(group)
    if type(group).__module__.split(".")[0] == "mpi4py":
        return MPICommunicator(group)
    raise TypeError(
        f"group is a {type(group).__name__}; must be None, a torch.distributed.ProcessGroup, an mpi4py "
        "communicator or a Communicator. For one process pass None."
    )
