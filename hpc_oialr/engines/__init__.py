"""Engines: how ranks share a model and its gradients, behind one interface."""

from hpc_oialr.engines.ddp import DDPEngine
from hpc_oialr.engines.deepspeed import DeepSpeedEngine
from hpc_oialr.engines.fsdp import FSDPEngine
from hpc_oialr.engines.settings import DDP, FSDP, DeepSpeed, EngineConfig, Single, TensorParallel, make_engine
from hpc_oialr.engines.tensor.engine import TensorEngine
from hpc_oialr.method.engine import Engine, SingleEngine, adopt

__all__ = [
    "DDP",
    "FSDP",
    "DDPEngine",
    "DeepSpeed",
    "DeepSpeedEngine",
    "Engine",
    "EngineConfig",
    "FSDPEngine",
    "Single",
    "SingleEngine",
    "TensorEngine",
    "TensorParallel",
    "adopt",
    "make_engine",
]
