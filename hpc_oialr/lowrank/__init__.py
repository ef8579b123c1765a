"""Low-rank layers, and the way from a dense model to a low-rank one and back."""

from hpc_oialr.lowrank.base import LowRankWeight
from hpc_oialr.lowrank.conversion import (
    convert,
    dense_parameters,
    low_rank_layers,
    merge,
    trainable_parameters,
    untied_state,
)
from hpc_oialr.lowrank.folded import fold
from hpc_oialr.lowrank.selection import Selection, select
from hpc_oialr.lowrank.stored import match_structure
from hpc_oialr.lowrank.targets import TargetWeight

__all__ = [
    "LowRankWeight",
    "Selection",
    "TargetWeight",
    "convert",
    "dense_parameters",
    "fold",
    "low_rank_layers",
    "match_structure",
    "merge",
    "select",
    "trainable_parameters",
    "untied_state",
]
