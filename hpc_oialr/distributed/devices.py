"""Which device a process computes on."""

from __future__ import annotations

import re

import torch
import torch.distributed as dist

from hpc_oialr.errors import WorldError


def choose_device(
    name: str | None, local_rank: int, local_size: int, gpus_of_node: int | None
) -> torch.device:
    """The device of a process: the CPU, or the GPU that belongs to its local rank.

    Parameters
    ----------
    name
        "cpu", "cuda", "cuda:INDEX" (one process only); None: "cuda" if there is one.
    local_rank, local_size
        This process's place on its node.
    gpus_of_node
        GPUs that the batch system gave to the job on this node, if known.

    Raises
    ------
    WorldError
        If there is no such device, or fewer GPUs than processes.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if re.fullmatch(r"cpu|cuda(:\d+)?", name) is None:
        raise WorldError(f"device is {name!r}; must be 'cpu', 'cuda' or 'cuda:INDEX'.")
    device = torch.device(name)
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise WorldError(
            f"device is {name!r} but torch {torch.__version__} sees no GPU; one must be visible. "
            "Use 'cpu', or install a CUDA build."
        )
    index: int | None = device.index
    if index is not None and local_size > 1:
        raise WorldError(
            f"device is {name!r} with {local_size} processes on this node; each must have its own. "
            f"Use {device.type!r}."
        )
    if index is not None:
        return device
    return torch.device("cuda", gpu_index(local_rank, local_size, torch.cuda.device_count(), gpus_of_node))


def gpu_index(local_rank: int, local_size: int, visible: int, gpus_of_node: int | None) -> int:
    """Index of a process's GPU: its local rank, or 0 where the launcher shows each process its own only.

    Raises
    ------
    WorldError
        If there are fewer GPUs than processes.
    """
    if gpus_of_node is not None and gpus_of_node < local_size:
        raise WorldError(
            f"{local_size} processes share a node on which the job has {gpus_of_node} GPUs; each must have "
            "its own. Correct --gpus-per-node or --ntasks-per-node."
        )
    if visible == 1:
        return 0
    if local_rank >= visible:
        raise WorldError(
            f"local rank {local_rank} of {local_size} has no GPU: {visible} are visible; each must have its "
            "own. Start fewer processes per node, or ask for --gpus-per-node as many."
        )
    return local_rank


def group_device(group: dist.ProcessGroup | None) -> torch.device:
    """The device whose tensors a process group can send: the GPU under NCCL, otherwise the CPU."""
    if "nccl" in str(dist.get_backend_config(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
