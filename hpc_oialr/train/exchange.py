"""Events of the method made known to all processes while the next step runs."""

from __future__ import annotations

from hpc_oialr.method.report import UpdateReport
from hpc_oialr.processes import MetricsChannel, World
from hpc_oialr.processes.metric_reduction import PendingReduction
from hpc_oialr.record.update_metrics import SharedUpdate, pack, unpack


class UpdateExchange:
    """One event under way at most; both methods are collective calls.

    Parameters
    ----------
    channel
        What carries the numbers.
    world
        The processes.
    """

    def __init__(self, channel: MetricsChannel, world: World) -> None:
        self.channel, self.world = channel, world
        self._under_way: tuple[UpdateReport, PendingReduction] | None = None

    def start(self, report: UpdateReport) -> None:
        """Send what this process knows of an event; the one before it must have been collected."""
        assert self._under_way is None
        vector = pack(report, self.world.rank, self.world.size)
        self._under_way = report, self.channel.start(vector)

    def collect(self) -> SharedUpdate | None:
        """The event that is under way, if there is one, as all processes saw it."""
        if self._under_way is None:
            return None
        report, pending = self._under_way
        self._under_way = None
        return unpack(report, self.world.size, pending.result())
