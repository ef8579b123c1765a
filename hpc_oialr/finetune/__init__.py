"""Fine-tuning of pretrained models by few parameters: SARA and Mo-SARA (arXiv 2408.03290)."""

from hpc_oialr.finetune.adapters import adapters, expert_load, merge_adapters
from hpc_oialr.finetune.layers import AdaptedLinear, MoSaraLinear, SaraLinear
from hpc_oialr.finetune.methods import SARA, FineTuning, Full, HeadOnly, MoSARA

__all__ = [
    "SARA",
    "AdaptedLinear",
    "FineTuning",
    "Full",
    "HeadOnly",
    "MoSARA",
    "MoSaraLinear",
    "SaraLinear",
    "adapters",
    "expert_load",
    "merge_adapters",
]
