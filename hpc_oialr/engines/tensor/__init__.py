"""Tensor parallelism: the weights of one layer in blocks over processes, and the layers that compute with them."""
