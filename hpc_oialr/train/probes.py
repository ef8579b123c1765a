"""Which steps to measure the memory of: those at which it can reach a new height."""

from __future__ import annotations

from hpc_oialr.method.config import OIALRConfig
from hpc_oialr.method.report import UpdateReport


class Probes:
    """Chooses the steps at which a run's memory may peak.

    These are the first two (the optimizer's state exists from the second on), every conversion, the
    first update, and the step after each. Later updates work on smaller factors.
    """

    def __init__(self, config: OIALRConfig | None, first: int) -> None:
        self.config = config
        self._wanted = {first, first + 1}

    def due(self, step: int) -> bool:
        """Whether the step after ``step`` steps is to be measured."""
        return step in self._wanted or self._may_convert(step + 1)

    def _may_convert(self, t: int) -> bool:
        config = self.config
        if config is None or t < config.delay:
            return False
        if config.stability_threshold is None:
            return t in (config.delay, config.delay + config.frequency)
        assert config.stability_frequency is not None
        return t % config.stability_frequency == 0 or t == config.delay

    def saw(self, report: UpdateReport) -> None:
        """Measure the step after a change of shapes that may be the first of its kind."""
        if report.kind == "stability":
            return
        assert self.config is not None
        if report.kind == "conversion" or report.t == self.config.delay + self.config.frequency:
            self._wanted.add(report.t)
