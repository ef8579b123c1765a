"""Low-rank training that pays: OIALR for PyTorch, from a laptop to a Slurm cluster.

Three lines in any training loop::

    oialr = OIALR(model, optimizer, OIALRConfig(delay=1000, frequency=500, rule=RelativeCutoff(0.1)))
    loss = criterion(oialr.model(x), y)      # the forward pass
    oialr.step()                             # after optimizer.step()
"""

from typing import TYPE_CHECKING

from hpc_oialr.lazy import offer

if TYPE_CHECKING:
    from hpc_oialr.linalg.noise_spectra import (
        MultilinearNoiseEdge,
        detection_threshold,
        predicted_alignment,
        predicted_eigenvalue,
    )
    from hpc_oialr.linalg.tensors import Tucker, hooi, mlsvd
    from hpc_oialr.lowrank import (
        Selection,
        dense_parameters,
        fold,
        low_rank_layers,
        match_structure,
        merge,
        trainable_parameters,
    )
    from hpc_oialr.method.config import OIALRConfig
    from hpc_oialr.method.oialr import OIALR
    from hpc_oialr.method.report import ChannelUpdate, LayerUpdate, UpdateReport
    from hpc_oialr.method.rules import (
        Budget,
        CumulativeSum,
        Energy,
        FixedFraction,
        NoiseEdge,
        OutputEnergy,
        RankLimits,
        RankRule,
        RelativeCutoff,
        StableRank,
    )
    from hpc_oialr.optim import MuonAdamW, muon_adamw, register_optimizer_state
    from hpc_oialr.serve.factored import load_factored

__version__ = "0.1.0"

__all__ = [
    "OIALR",
    "Budget",
    "ChannelUpdate",
    "CumulativeSum",
    "Energy",
    "FixedFraction",
    "LayerUpdate",
    "MultilinearNoiseEdge",
    "MuonAdamW",
    "NoiseEdge",
    "OIALRConfig",
    "OutputEnergy",
    "RankLimits",
    "RankRule",
    "RelativeCutoff",
    "Selection",
    "StableRank",
    "Tucker",
    "UpdateReport",
    "dense_parameters",
    "detection_threshold",
    "fold",
    "hooi",
    "load_factored",
    "low_rank_layers",
    "match_structure",
    "merge",
    "mlsvd",
    "muon_adamw",
    "predicted_alignment",
    "predicted_eigenvalue",
    "register_optimizer_state",
    "trainable_parameters",
]

offer(__name__)
