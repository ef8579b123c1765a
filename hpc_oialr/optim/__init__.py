"""Optimizers for low-rank cores, and the way optimizer state follows a change of basis."""

from hpc_oialr.optim.muon import MuonAdamW, muon_adamw

__all__ = ["MuonAdamW", "muon_adamw"]
