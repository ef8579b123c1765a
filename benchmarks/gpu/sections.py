"""All sections in order of execution, and each one's share of the budget."""

from __future__ import annotations

from benchmarks.gpu import accuracy, card, layer, marked_tests, step, svd, update
from benchmarks.gpu.runner import Plan

PLANS = (
    Plan("card", 4, card.cases),
    Plan("layer", 18, layer.cases),
    Plan("step", 46, step.cases),
    Plan("update", 10, update.cases),
    Plan("accuracy", 18, accuracy.cases),
    Plan("svd", 6, svd.cases),
    Plan("pytest", 10, marked_tests.cases),
)
