"""Optimizers for low-rank cores, and the way optimizer state follows a change of basis."""

from hpc_oialr.optim.muon import MuonAdamW, muon_adamw
from hpc_oialr.optim.state_kinds import register_optimizer_state

__all__ = ["MuonAdamW", "muon_adamw", "register_optimizer_state"]
