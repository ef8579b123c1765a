"""GPUs, networks and clusters by name, as their makers and operators state them.

FLOP/s are those of dense matrix products (without sparsity), and fp32 is plain fp32: torch multiplies in TF32 only
where it is told to. What a run reaches of each is an assumption, named in every plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from hpc_oialr.errors import UnknownNameError
from hpc_oialr.plan.timing import Link, Machine

# Assumed: what transformers and convolutional nets of common sizes reach of the peak without torch.compile.
EFFICIENCY = 0.4
# Assumed: cuSOLVER's gesvdj works on one small matrix at a time, bound by latency rather than arithmetic.
SVD_SHARE = 0.01
# Assumed: share of a link's bandwidth that large collectives reach, and of the memory's that kernels reach.
LINK_EFFICIENCY = 0.8
# Assumed: eager kernels, launched one by one from Python.
LAUNCH_S = 6e-6
# Assumed: gradients are sent during the backward pass, except for the last bucket.
OVERLAP = 0.8
# NCCL's own estimates, src/graph/tuning.cc (hwLat, ring, protocol Simple): 3.4 us a hop over NVLink, 9.6 us over
# the network. RCCL has the same table.
NVLINK_HOP_S, NETWORK_HOP_S = 3.4e-6, 9.6e-6


@dataclass(frozen=True)
class GPUPreset:
    """A data sheet: memory as CUDA shows it, TFLOP/s in bf16 and fp32, memory's TB/s, GB/s to a GPU of the node."""

    source: str
    memory_gib: float
    bf16: float
    fp32: float
    tb_per_s: float
    peer_gb_per_s: float


@dataclass(frozen=True)
class NetworkPreset:
    """One adapter: its line rate in GB/s, one direction."""

    source: str
    gb_per_s: float


@dataclass(frozen=True)
class ClusterPreset:
    """A cluster's GPU nodes; GPUs and adapters per node, and where its operator says so."""

    gpu: str
    network: str
    gpus_per_node: int
    adapters: int
    source: str


GPUS = {
    "a100-40": GPUPreset("NVIDIA A100 SXM4 data sheet", 39.4, 312.0, 19.5, 1.555, 300.0),
    "a100-80": GPUPreset("NVIDIA A100 SXM4 data sheet", 79.2, 312.0, 19.5, 2.039, 300.0),
    "h100": GPUPreset("NVIDIA H100 SXM5 data sheet", 79.1, 989.0, 67.0, 3.35, 450.0),
    # One of its two dies, which is one device for Slurm and torch.
    "mi250x": GPUPreset("AMD Instinct MI250X data sheet, one die", 63.9, 191.5, 47.9, 1.6, 50.0),
}
NETWORKS = {
    "hdr200": NetworkPreset("NVIDIA ConnectX-6 data sheet", 25.0),
    "ndr": NetworkPreset("NVIDIA ConnectX-7 data sheet", 50.0),
    "slingshot11": NetworkPreset("HPE Slingshot interconnect data sheet", 25.0),
}
CLUSTERS = {
    "horeka": ClusterPreset("a100-40", "hdr200", 4, 2, "NHR@KIT documentation, HoreKa hardware overview"),
    "juwels_booster": ClusterPreset("a100-40", "hdr200", 4, 4, "JSC, JUWELS configuration"),
    "perlmutter": ClusterPreset("a100-40", "slingshot11", 4, 4, "NERSC documentation, Perlmutter"),
    "lumi": ClusterPreset("mi250x", "slingshot11", 8, 4, "LUMI documentation, LUMI-G"),
}

_Preset = TypeVar("_Preset")


def _named(kind: str, name: str, presets: Mapping[str, _Preset]) -> _Preset:
    if name not in presets:
        raise UnknownNameError(kind, name, presets)
    return presets[name]


def cluster(name: str) -> ClusterPreset:
    """A cluster's preset.

    Raises
    ------
    UnknownNameError
        Listing the valid names; so do the other functions.
    """
    return _named("site", name.replace("-", "_"), CLUSTERS)


def network_link(name: str) -> tuple[Link, str]:
    """One adapter of a network, and where its figures are from."""
    preset = _named("network", name, NETWORKS)
    link = Link(NETWORK_HOP_S, LINK_EFFICIENCY * preset.gb_per_s * 1e9)
    return link, f"{name} ({preset.source}; latency: NCCL src/graph/tuning.cc)"


def gpu_machine(gpu: str, network: str, adapters: int) -> Machine:
    """Nodes of GPUs, connected by a network; every figure stated, none measured."""
    preset = _named("GPU", gpu, GPUS)
    between, source = network_link(network)
    half, full = EFFICIENCY * preset.bf16 * 1e12, EFFICIENCY * preset.fp32 * 1e12
    return Machine(
        speeds=f"stated: {gpu} ({preset.source})",
        links=f"stated: {source}",
        assumed=f"a run reaches {EFFICIENCY:.0%} of the GPU's FLOP/s, an SVD {SVD_SHARE:.0%} of those in fp32, "
        f"collectives {LINK_EFFICIENCY:.0%} of the bandwidth; {OVERLAP:.0%} of the backward pass hides messages",
        memory_gib=preset.memory_gib,
        flops={"bfloat16": half, "float16": half, "float32": full, "float64": full},
        bytes_per_s=LINK_EFFICIENCY * preset.tb_per_s * 1e12,
        launch_s=LAUNCH_S,
        svd_flops=SVD_SHARE * preset.fp32 * 1e12,
        overlap=OVERLAP,
        inside=Link(NVLINK_HOP_S, LINK_EFFICIENCY * preset.peer_gb_per_s * 1e9),
        between=between,
        adapters=adapters,
    )
