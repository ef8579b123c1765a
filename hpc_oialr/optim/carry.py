"""The former name of :mod:`hpc_oialr.optim.state`."""

from hpc_oialr.optim.state import transform_average as carry_average
from hpc_oialr.optim.state import transform_state as carry

__all__ = ["carry", "carry_average"]
