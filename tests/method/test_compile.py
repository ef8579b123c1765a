"""torch.compile through conversion and cuts: the same losses, and one graph for every set of shapes."""

from __future__ import annotations

import pytest
import torch
from support.gpu_loop import one_step
from torch import nn

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits


class Network(nn.Module):
    """A module of the user's own: torch's containers are not compiled as one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = nn.functional.gelu(layer(x))
        return self.layers[-1](x)


def train(*, compiled: bool) -> tuple[list[float], int]:
    """Losses, and the number of graphs compiled."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    model = Network()
    limits = RankLimits(max_drop=0.5, at_conversion=0.75, round_to=8)
    config = OIALRConfig(
        delay=2, frequency=2, rule=FixedFraction(0.25), limits=limits, layer_share_step=1.0, importance="weights"
    )
    oialr = OIALR(model, torch.optim.AdamW(model.parameters(), lr=1e-2), config)
    if compiled:
        oialr.module.compile()
    x, y, losses = torch.randn(32, 16), torch.randint(0, 4, (32,)), []
    for _ in range(12):
        losses.append(one_step(oialr, x, y)[0].item())
    return losses, int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.long
def test_one_graph_for_every_set_of_shapes() -> None:
    eager, _ = train(compiled=False)
    losses, graphs = train(compiled=True)
    assert losses == pytest.approx(eager, rel=1e-3)
    # Dense; r = 12 and 24, rounded up to 16 and 24; then 8 and 16; then 8 and 8. Later updates cut nothing.
    assert graphs == 4
