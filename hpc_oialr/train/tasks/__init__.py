"""What a model is trained to do: its loss, its metric, and how they add up over processes."""

from hpc_oialr.train.tasks.base import StepRNG, Task
from hpc_oialr.train.tasks.classification import Classification
from hpc_oialr.train.tasks.forecasting import Forecasting
from hpc_oialr.train.tasks.language import LanguageModelling

__all__ = ["Classification", "Forecasting", "LanguageModelling", "StepRNG", "Task"]
