"""Events of the method made known to all processes while the next step runs."""

from __future__ import annotations

from hpc_oialr.distributed import MetricsChannel, World
from hpc_oialr.distributed.metric_reduction import PendingReduction
from hpc_oialr.method.report import UpdateReport
from hpc_oialr.record.update_metrics import SharedUpdate, pack, unpack


class UpdateExchange:
    """What one step did is under way at most; both methods are collective calls.

    Parameters
    ----------
    channel
        What carries the numbers.
    world
        The processes.
    """

    def __init__(self, channel: MetricsChannel, world: World) -> None:
        self.channel, self.world = channel, world
        self._under_way: list[tuple[UpdateReport, PendingReduction]] = []

    def start(self, report: UpdateReport) -> None:
        """Send what this process knows of a step's events; those before must have been collected."""
        assert not self._under_way
        for event in report.all:
            vector = pack(event, self.world.rank, self.world.size)
            self._under_way.append((event, self.channel.start(vector)))

    def collect(self) -> list[SharedUpdate]:
        """The events that are under way, as all processes saw them."""
        events, self._under_way = self._under_way, []
        return [unpack(event, pending.result()) for event, pending in events]
