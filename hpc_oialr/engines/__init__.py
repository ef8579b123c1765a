"""Engines: how a model's processes share its gradients, behind one interface."""

from hpc_oialr.engines.base import Engine
from hpc_oialr.engines.ddp import DDPEngine
from hpc_oialr.engines.factory import adopt, make_engine
from hpc_oialr.engines.single import SingleEngine

__all__ = ["DDPEngine", "Engine", "SingleEngine", "adopt", "make_engine"]
