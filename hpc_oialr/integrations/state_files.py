"""A controller's state as files beside a checkpoint that another library writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from hpc_oialr import OIALR
from hpc_oialr.errors import CheckpointError
from hpc_oialr.record.files import draft_of, to_json, write_atomically

NAME = "oialr.json"


def save_state(oialr: OIALR, folder: Path) -> None:
    """Write counters, r and, in the last steps before a change, each rank's sums; a collective call.

    ``folder`` is shared by all ranks. Rank 0 writes ``oialr.json`` last, so that it stands for all files.
    """
    world = oialr.engine.world
    tensors = own_tensors(oialr)
    folder.mkdir(parents=True, exist_ok=True)
    if tensors:
        with draft_of(_tensor_file(folder, world.rank, world.size)) as draft:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft)
    counts = world.all_gather_object(len(tensors))
    if world.rank == 0:
        state = {"version": 1, "tensors": counts, **oialr.state_dict()}
        write_atomically(folder / NAME, to_json(state, indent=1) + "\n")


def read_state(folder: Path) -> dict[str, Any]:
    """What :func:`save_state` wrote into ``oialr.json``; a CheckpointError that names the file if it is missing."""
    path = folder / NAME
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        version, _ = state["version"], state["r"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing: the checkpoint was made without OIALR, or the run ended while it was written. Resume "
            "from an earlier checkpoint of the run."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error!r}). Resume from an earlier checkpoint of the run."
        ) from error
    if version != 1:
        raise CheckpointError(f"{path} has version {version!r}; this version of hpc_oialr reads 1. Use a newer one.")
    return dict(state)


def load_state(oialr: OIALR, folder: Path) -> None:
    """Give a controller what :func:`save_state` wrote: layers of the stored r, still empty if they were dense."""
    state, tensors = read_state(folder), dict[str, Tensor]()
    counts = state["tensors"]
    for rank, count in enumerate(counts):
        path = _tensor_file(folder, rank, len(counts))
        # Rank 0 also has what all ranks share.
        if not count or (rank and rank % oialr.engine.world.size != oialr.engine.world.rank):
            continue
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, which {NAME} beside it names. Resume from an earlier checkpoint."
            )
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
    oialr.load_state_dict(state, tensors)


def own_tensors(oialr: OIALR) -> dict[str, Tensor]:
    """This rank's part of ``oialr.tensor_state()``, whole, on the CPU; what ranks share is rank 0's. Collective."""
    rank = oialr.engine.world.rank
    tensors = {name: _whole(tensor) for name, tensor in oialr.tensor_state().items()}
    # Names of sums end with the rank they are of.
    return {name: each.cpu() for name, each in tensors.items() if rank == 0 or name.endswith(f".{rank}")}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _tensor_file(folder: Path, rank: int, size: int) -> Path:
    return folder / f"oialr-{rank}-of-{size}.safetensors"
