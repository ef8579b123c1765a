"""Compute on a GPU and let NCCL sum over one process; a broken driver may hang this process.

python try_cuda.py LOCAL_RANK
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from typing import Any

_ONES = 2**20


def driver_cuda() -> int | None:
    """The newest CUDA that the driver speaks, e.g. 12080 for 12.8; None where there is no driver."""
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value or None


def look() -> dict[str, Any]:
    """What torch sees."""
    import torch

    try:
        torch.cuda.init()
        error = ""
    except (RuntimeError, AssertionError) as failed:
        error = str(failed).strip().splitlines()[0]
    count = torch.cuda.device_count() if not error else 0
    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "torch_hip": torch.version.hip,
        "error": error,
        "names": [torch.cuda.get_device_name(index) for index in range(count)],
    }


def compute(index: int) -> dict[str, Any]:
    """A sum on one GPU, and memory that others leave (bytes)."""
    import torch

    free, total = torch.cuda.mem_get_info(index)
    right = torch.ones(_ONES, device=f"cuda:{index}").sum().item() == _ONES
    pairs = [other for other in range(torch.cuda.device_count()) if other != index]
    peers = [other for other in pairs if torch.cuda.can_device_access_peer(index, other)]
    return {
        "index": index,
        "free": free,
        "total": total,
        "right": right,
        "others": len(pairs),
        "peers": len(peers),
    }


def all_reduce(index: int) -> dict[str, Any]:
    """NCCL's all-reduce over this process alone."""
    import torch

    dist: Any = importlib.import_module("torch.distributed")
    if not dist.is_nccl_available():
        return {"nccl": None}
    torch.cuda.set_device(index)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    ones = torch.ones(_ONES, device=f"cuda:{index}")
    dist.all_reduce(ones)
    right = ones.sum().item() == _ONES
    return {"nccl": ".".join(map(str, torch.cuda.nccl.version())), "reduced": right}


def main(local_rank: int) -> None:
    """As far as it goes."""
    _say({"driver_cuda": driver_cuda()})
    seen = look()
    _say(seen)
    if not seen["names"]:
        return
    # One visible GPU is this process's own, whatever its local rank.
    index = local_rank if len(seen["names"]) > 1 else 0
    if index < len(seen["names"]):
        _say(compute(index))
        _say(all_reduce(index))


def _say(found: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
