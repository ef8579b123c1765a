"""Tensor parallelism: the weights of one layer in blocks over ranks, and the layers that compute with them."""
