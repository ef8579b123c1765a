"""A training loop on any device, as a user would write it: the subject of the tests marked ``gpu``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits, muon_adamw
from hpc_oialr.method.report import UpdateReport

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "MuonAdamW": lambda model: muon_adamw(model, lr=0.01),
}
WIDTH, CLASSES, BATCH = 64, 8, 32


class Network(nn.Module):
    """Three layers that become low-rank, a norm, and a head that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)]
        )
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return self.head(self.norm(x))


def network(device: torch.device) -> Network:
    """The same values on every device."""
    torch.manual_seed(0)
    return Network().to(device)


def batch(device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and classes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    return x.to(device), torch.randint(0, CLASSES, (BATCH,), generator=generator).to(device)


def settings(delay: int = 2, frequency: int = 2, **options: object) -> OIALRConfig:
    """Half of k at the conversion, a quarter in the end, all layers in every update."""
    limits = RankLimits(max_drop=0.5, at_conversion=0.5, round_to=8)
    return OIALRConfig(
        delay=delay,
        frequency=frequency,
        rule=FixedFraction(0.25),
        limits=limits,
        layer_share_step=1.0,
        **options,  # type: ignore[arg-type]
    )


def make(device: torch.device, optimizer: str = "AdamW", **options: object) -> OIALR:
    """The method around a new network."""
    model = network(device)
    return OIALR(model, OPTIMIZERS[optimizer](model), settings(**options))  # type: ignore[arg-type]


def one_step(
    oialr: OIALR, x: Tensor, y: Tensor, *, dtype: torch.dtype | None = None, clip: float | None = None
) -> tuple[Tensor, UpdateReport | None]:
    """The loss, on the device, and what the method did."""
    with torch.autocast(x.device.type, dtype=dtype, enabled=dtype is not None):
        loss = nn.functional.cross_entropy(oialr.model(x), y)
    loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_([p for p in oialr.module.parameters() if p.requires_grad], clip)
    oialr.optimizer.step()
    oialr.optimizer.zero_grad()
    return loss.detach(), oialr.step()


def train(oialr: OIALR, steps: int, **options: object) -> list[float]:
    """Losses."""
    x, y = batch(next(oialr.module.parameters()).device)
    return [float(one_step(oialr, x, y, **options)[0]) for _ in range(steps)]  # type: ignore[arg-type]


@contextmanager
def no_synchronisation(device: torch.device) -> Iterator[None]:
    """On a GPU an operation for which the host must wait is an error inside."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
