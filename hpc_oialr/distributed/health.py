"""Checks before a run: every device computes and is used once, versions and settings agree, a sum is correct."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

import hpc_oialr
from hpc_oialr.distributed.environment import node_name
from hpc_oialr.distributed.world import World
from hpc_oialr.errors import HealthError

_SKIP = "To start without this check: --train.health_check false"


@dataclass(frozen=True)
class NodeInfo:
    """One rank's node, device and versions."""

    node: str
    fault: str  # what is wrong with its device, or ""
    device: str  # which no other rank on the node may use; "" for a CPU
    versions: Mapping[str, str]  # of what must be the same on all ranks


def check_health(world: World, settings: str) -> None:
    """Raise :class:`HealthError` on all ranks unless each is fit and all agree; a collective call.

    Every rank computes on its device; versions and ``settings``, a digest of the run's, are compared; a sum over all
    ranks, on the devices, must be correct.
    """
    everyone = world.all_gather_object(node_info(world, settings))
    check_devices(everyone)
    check_versions(everyone)
    total = world.all_reduce(torch.full((256,), world.rank + 1.0, device=world.device))
    spread = float(total.min()), float(total.max())
    check_sums([info.node for info in everyone], world.all_gather_object(spread))


def node_info(world: World, settings: str) -> NodeInfo:
    """Of this rank; computes on its device."""
    versions = {
        "torch": torch.__version__,
        "hpc_oialr": hpc_oialr.__version__,
        "Python": platform.python_version(),
        "settings": settings,
    }
    fault = device = ""
    try:
        ones = torch.ones(64, 64, device=world.device)
        total = float((ones @ ones).sum())
        if total != 64.0**3:
            fault = f"a sum that is 262144 came out as {total:g}"
    except RuntimeError as error:
        fault = " ".join(str(error).split())[:200]
    if world.device.type == "cuda" and not fault:
        device = f"GPU {torch.cuda.get_device_properties(world.device).uuid}"
    return NodeInfo(node_name(), fault, device, versions)


def check_devices(everyone: Sequence[NodeInfo]) -> None:
    """Raise :class:`HealthError` if a device does not compute or two ranks share one."""
    faulty = [rank for rank, info in enumerate(everyone) if info.fault]
    if faulty:
        found = f"cannot compute on its device ({everyone[faulty[0]].fault}); every rank must"
        raise _unfit([info.node for info in everyone], faulty, found)
    holders: dict[tuple[str, str], int] = {}
    for rank, info in enumerate(everyone):
        other = holders.setdefault((info.node, info.device), rank)
        if info.device and other != rank:
            raise HealthError(
                f"ranks {other} and {rank} on node {info.node} both compute on {info.device}; each must have its own. "
                f"Ask for as many --gpus-per-node as --ntasks-per-node, and not for --gpus-per-task. {_SKIP}"
            )


def check_versions(everyone: Sequence[NodeInfo]) -> None:
    """Raise :class:`HealthError` that names the ranks with another version than most."""
    for name in everyone[0].versions:
        values = [info.versions[name] for info in everyone]
        usual = Counter(values).most_common(1)[0][0]
        others = [rank for rank, value in enumerate(values) if value != usual]
        if others:
            found = f"has {name} {values[others[0]]}, most have {usual}; all must be the same"
            raise _unfit([info.node for info in everyone], others, found)


def check_sums(nodes: Sequence[str], spreads: Sequence[tuple[float, float]]) -> None:
    """Raise :class:`HealthError` that names the ranks whose sum of 1 to P is wrong in any of its copies.

    ``spreads``: smallest and largest copy of each rank's sum.
    """
    right = len(nodes) * (len(nodes) + 1) / 2
    wrong = [rank for rank, spread in enumerate(spreads) if spread != (right, right)]
    if wrong:
        low, high = spreads[wrong[0]]
        found = f"was given {low:g} to {high:g} as the sum over all ranks, which is {right:g}"
        raise _unfit(nodes, wrong, found)


def _unfit(nodes: Sequence[str], ranks: Sequence[int], found: str) -> HealthError:
    more = f" ({len(ranks) - 1} more ranks like it)" if len(ranks) > 1 else ""
    exclude = ",".join(dict.fromkeys(nodes[rank] for rank in ranks))
    return HealthError(
        f"rank {ranks[0]} of {len(nodes)} on node {nodes[ranks[0]]} {found}{more}. "
        f"To leave out what is unfit: sbatch --exclude={exclude}. {_SKIP}"
    )
