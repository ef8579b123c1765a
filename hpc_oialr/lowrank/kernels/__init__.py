"""Fused Triton kernels of a low-rank layer, for GPUs; optional, since they need the package triton."""
