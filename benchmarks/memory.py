"""Memory of a process: parameters, gradients and optimizer state under each engine, against DDP's.

`text_gpt`'s model on `--processes` gloo processes (DeepSpeed with AdamW, the others with Muon beside AdamW).
`dense_mib` and `low_rank_mib`: all tensors of the process that has most, after a backward pass, before the
conversion and at r = k/4; ratios are to `ddp` with the same optimizer. The highest that all tensors reached:
`dense_step_mib` and `low_rank_step_mib` in forward and backward, activations included; `conversion_mib` and
`update_mib` in the event. The rows `updates` cut r by one or two in each of `--updates` updates, so that every
one changes shapes and rebuilds what must be: live tensors, their bytes and the resident set after the tenth
and the last.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Row, arguments, finish
from benchmarks.processes import ENGINES, on_processes
from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits
from hpc_oialr.models import GPT2
from hpc_oialr.processes import World
from hpc_oialr.record.memory import MemoryMeter
from hpc_oialr.train.optimizers import AdamW, MuonAdamW

MIB = 1024**2
OFF = torch.amp.GradScaler("cpu", enabled=False)


@dataclass
class Run:
    """A model in training under an engine."""

    engine: Any
    oialr: OIALR
    optimizer: torch.optim.Optimizer
    tokens: Tensor

    def forward_backward(self) -> None:
        """Gradients of one batch."""
        self.engine.backward(self.oialr.model(input_ids=self.tokens, labels=self.tokens).loss, OFF)

    def optimize(self) -> None:
        """The optimizer's step."""
        trained = [p for p in self.oialr.module.parameters() if p.requires_grad]
        self.engine.update(self.optimizer, OFF, trained, None)

    def step(self) -> None:
        """A whole step."""
        self.forward_backward()
        self.optimize()
        self.oialr.step()


def make(name: str, optimizer_name: str, config: OIALRConfig, depth: int) -> Run:
    """The recipe's model under an engine."""
    world = World.from_environment(device="cpu", timeout_s=300)
    engine = ENGINES[name]().build(world, "fp32")
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(world.rank))
    module: nn.Module = GPT2(dim=384, depth=depth, heads=6).build({"input_ids": tokens})
    engine.place(module)
    kind = AdamW(lr=1e-3) if optimizer_name == "AdamW" else MuonAdamW(lr=0.01)
    optimizer = kind.build(module)
    return Run(engine, OIALR(module, optimizer, config, engine=engine), optimizer, tokens)


def live() -> list[Tensor]:
    """Every tensor of this process."""
    gc.collect()
    found = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    return [getattr(tensor, "_local_tensor", tensor) for tensor in found]


def live_bytes() -> int:
    """Bytes of every tensor of this process, each storage once."""
    storages = {}
    for tensor in live():
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def probed(action: Callable[[], object]) -> float:
    """The highest that all tensors reach (MiB)."""
    meter = MemoryMeter(live, processes=World.current().size)
    with meter.probe():
        action()
    return meter.peak_bytes / MIB


def phases(name: str, optimizer_name: str) -> Row:
    """Dense, conversion, update, low rank."""
    limits = RankLimits(at_conversion=0.4, max_drop=0.4, round_to=8)
    config = OIALRConfig(delay=4, frequency=2, rule=FixedFraction(0.25), limits=limits, layer_share_step=1.0)
    run = make(name, optimizer_name, config, depth=6)
    run.step()
    run.step()
    run.forward_backward()
    row: Row = {"dense_mib": live_bytes() / MIB}
    run.optimize()
    run.oialr.step()
    row["dense_step_mib"] = probed(run.forward_backward)
    run.optimize()
    row["conversion_mib"] = probed(run.oialr.step)
    run.step()
    run.forward_backward()
    run.optimize()
    row["update_mib"] = probed(run.oialr.step)
    run.step()
    run.step()
    row["low_rank_step_mib"] = probed(run.forward_backward)
    row["low_rank_mib"] = live_bytes() / MIB
    return row


def growth(name: str, optimizer_name: str, updates: int) -> Row:
    """Many updates, each of which changes shapes."""
    limits = RankLimits(max_drop=0.0065, min_fraction=0.05)
    config = OIALRConfig(delay=1, frequency=1, rule=FixedFraction(0.05), limits=limits, layer_share_step=1.0)
    run = make(name, optimizer_name, config, depth=2)
    row: Row = {}
    for update in range(updates + 1):
        run.step()
        if update in (10, updates):
            when = "first" if update == 10 else "last"
            row |= {
                f"{when}_mib": live_bytes() / MIB,
                f"{when}_tensors": len(live()),
                f"{when}_rss_mib": rss_mib(),
            }
    row["r"] = max(run.oialr.r.values())
    return row


def rss_mib() -> float:
    """Resident set of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def measure(size: int, function: Callable[..., Row], *args: Any) -> Row:
    """The largest figure of any process."""
    rows = on_processes(size, function, *args)
    return {key: max(row[key] for row in rows) for key in rows[0]}


def main() -> None:
    """Every engine."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--updates", type=int, default=200, help="0 leaves the long runs out")
    options = parser.parse_args()
    rows: list[Row] = []
    for optimizer in ("MuonAdamW", "AdamW"):
        reference = measure(options.processes, phases, "ddp", optimizer)
        for name in options.engines:
            if name.startswith("zero") and optimizer != "AdamW":
                continue
            row = reference if name == "ddp" else measure(options.processes, phases, name, optimizer)
            ratios = {f"{phase}_ratio": row[f"{phase}_mib"] / reference[f"{phase}_mib"] for phase in
                      ("dense", "low_rank", "conversion", "update")}  # fmt: skip
            rows.append({"kind": "phases", "engine": name, "optimizer": optimizer, **row, **ratios})
            finish(rows, options.out, processes=options.processes)
    phases_rows = list(rows)
    for name in options.engines if options.updates else ():
        row = measure(2, growth, name, "AdamW", options.updates)
        rows.append(
            {"kind": "updates", "engine": name, "optimizer": "AdamW", "updates": options.updates, **row}
        )
        finish(rows, options.out, processes=options.processes)
    finish(phases_rows, None)
    finish(rows[len(phases_rows) :], None)


if __name__ == "__main__":
    main()
