"""GPUs, networks and clusters by name, from what their makers and operators publish.

Peaks are those of dense matrix products (without sparsity). fp32 is plain fp32: torch multiplies in TF32 only
where it is told to. What share of them a model reaches, and of a link's bandwidth a collective, is assumed: see
``EFFICIENCY``, ``SVD_SHARE`` and ``LINK_EFFICIENCY``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpc_oialr.errors import UnknownNameError
from hpc_oialr.plan.collectives import Link
from hpc_oialr.plan.device import Device
from hpc_oialr.plan.network import Network

# Assumed: what transformers and convolutional nets of common sizes reach without torch.compile.
EFFICIENCY = 0.4
# Assumed: cuSOLVER's gesvdj works on one small matrix at a time, bound by latency rather than arithmetic.
SVD_SHARE = 0.01
# Assumed: share of a link's bandwidth that large collectives reach.
LINK_EFFICIENCY = 0.8
# Assumed: eager kernels, launched one by one from Python.
LAUNCH_S = 6e-6
# Assumed: gradients travel beside the backward pass, but for the last bucket.
OVERLAP = 0.8

# NCCL's own estimates, src/graph/tuning.cc (baseLat and hwLat, ring, protocol Simple): 8.4 us a collective,
# 3.4 us a hop over NVLink, 9.6 us over the network. RCCL has the same table.
START_S, NVLINK_HOP_S, NETWORK_HOP_S = 8.4e-6, 3.4e-6, 9.6e-6


def _link(hop_s: float, gb_per_s: float) -> Link:
    return Link(hop_s, 1e-9 / (gb_per_s * LINK_EFFICIENCY))


def _gpu(
    name: str, source: str, memory_gib: float, tflops: dict[str, float], tb_per_s: float, peer: float
) -> Device:
    """``peer``: GB/s to the other GPUs of a node, one direction."""
    return Device(
        name=name,
        origin="preset",
        source=source,
        memory_gib=memory_gib,
        peak={dtype: value * 1e12 for dtype, value in tflops.items()},
        efficiency=EFFICIENCY,
        bandwidth=tb_per_s * 1e12,
        launch_s=LAUNCH_S,
        svd_flops=SVD_SHARE * tflops["float32"] * 1e12,
        inside=_link(NVLINK_HOP_S, peer),
        overlap=OVERLAP,
    )


_A100 = {"bfloat16": 312.0, "float16": 312.0, "float32": 19.5, "float64": 19.5}
# Memory is what CUDA shows of it, in GiB.
GPUS = {
    device.name: device
    for device in (
        # NVIDIA A100 data sheet (SXM4): 40 GB HBM2 1.555 TB/s, 80 GB HBM2e 2.039 TB/s, NVLink 600 GB/s both ways.
        _gpu("a100-40", "NVIDIA A100 SXM4 data sheet", 39.4, _A100, 1.555, 300),
        _gpu("a100-80", "NVIDIA A100 SXM4 data sheet", 79.2, _A100, 2.039, 300),
        # NVIDIA H100 data sheet (SXM5): 989 bf16, 67 fp32 and fp64 tensor, HBM3 3.35 TB/s, NVLink 900 GB/s both ways.
        _gpu(
            "h100",
            "NVIDIA H100 SXM5 data sheet",
            79.1,
            {"bfloat16": 989.0, "float16": 989.0, "float32": 67.0, "float64": 67.0},
            3.35,
            450,
        ),
        # AMD Instinct MI250X data sheet, one of its two dies, which is one device: half of 383 bf16, 95.7 fp32 and
        # fp64 matrix, 128 GB, 3.2 TB/s; Infinity Fabric 50 GB/s a link and direction between packages.
        _gpu(
            "mi250x",
            "AMD Instinct MI250X data sheet, one die",
            63.9,
            {"bfloat16": 191.5, "float16": 191.5, "float32": 47.9, "float64": 47.9},
            1.6,
            50,
        ),
    )
}

# Line rate of one adapter, one direction.
NETWORKS = {
    # NVIDIA ConnectX-6: InfiniBand HDR, 200 Gb/s.
    "hdr200": ("NVIDIA ConnectX-6 data sheet", 25.0),
    # NVIDIA ConnectX-7: InfiniBand NDR, 400 Gb/s.
    "ndr": ("NVIDIA ConnectX-7 data sheet", 50.0),
    # HPE Slingshot 11 (Cassini): 200 Gb/s.
    "slingshot11": ("HPE Slingshot interconnect data sheet", 25.0),
}


@dataclass(frozen=True)
class Site:
    """A cluster's GPU nodes.

    Attributes
    ----------
    gpu, network
        Names of presets.
    gpus_per_node, adapters
        Of a node; an MI250X counts as two GPUs, as it does for Slurm and torch.
    source
        Where its operator says so.
    """

    gpu: str
    network: str
    gpus_per_node: int
    adapters: int
    source: str


SITES = {
    "horeka": Site("a100-40", "hdr200", 4, 2, "NHR@KIT user documentation, HoreKa hardware overview"),
    "juwels_booster": Site("a100-40", "hdr200", 4, 4, "JSC, JUWELS configuration"),
    "perlmutter": Site("a100-40", "slingshot11", 4, 4, "NERSC documentation, Perlmutter architecture"),
    "lumi": Site("mi250x", "slingshot11", 8, 4, "LUMI documentation, LUMI-G"),
}


def gpu(name: str) -> Device:
    """A GPU's preset.

    Raises
    ------
    UnknownNameError
        Listing the valid names.
    """
    if name not in GPUS:
        raise UnknownNameError("GPU", name, GPUS)
    return GPUS[name]


def network(name: str, device: Device, *, adapters: int) -> Network:
    """A network's preset between nodes of ``device``.

    Raises
    ------
    UnknownNameError
        Listing the valid names.
    """
    if name not in NETWORKS:
        raise UnknownNameError("network", name, NETWORKS)
    source, gb_per_s = NETWORKS[name]
    return Network(
        name=name,
        origin="preset",
        source=f"{source}; latencies: NCCL src/graph/tuning.cc",
        inside=device.inside,
        between=_link(NETWORK_HOP_S, gb_per_s),
        adapters=adapters,
        start_s=START_S,
    )


def site(name: str) -> Site:
    """A cluster's preset.

    Raises
    ------
    UnknownNameError
        Listing the valid names.
    """
    key = name.replace("-", "_")
    if key not in SITES:
        raise UnknownNameError("site", name, SITES)
    return replace(SITES[key])
