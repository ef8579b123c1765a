"""Memory of a process: parameters, gradients and optimizer state under each engine, against DDP's.

`text_gpt`'s model on `--processes` gloo processes (DeepSpeed with AdamW, the others with Muon beside AdamW).
`dense_mib` and `low_rank_mib`: all tensors of the process that has most, after a backward pass (when gradients
are there and activations are not), before the conversion and at r = k/4; ratios are to `ddp` with the same
optimizer. The highest that all tensors reached: `dense_step_mib` and `low_rank_step_mib` in forward and
backward, activations included; `conversion_mib` and `update_mib` in the event.

The rows `updates`, on two processes and a small model, cut r by one or two in each of `--updates` updates, so that
every one changes shapes and rebuilds what must be: live tensors, their bytes, Python's objects, and the resident
set after the tenth and the last; as r falls, so must bytes. Torch keeps the code of up to 1,024 products that oneDNN
has compiled, some 0.6 MiB each, one for every new shape; here it is told to keep none of them.

Goes on where it was interrupted.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Row, arguments, earlier, finish
from benchmarks.processes import ENGINES, on_processes
from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits
from hpc_oialr.distributed import World
from hpc_oialr.models import GPT2
from hpc_oialr.record.memory import MemoryMeter
from hpc_oialr.train.optimizers import AdamW, MuonAdamW

MIB = 1024**2
NO_COMPILED_PRODUCTS = {"LRU_CACHE_CAPACITY": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
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


def make(name: str, optimizer_name: str, config: OIALRConfig, *, dim: int = 384, depth: int = 6) -> Run:
    """The recipe's model, or a smaller one, under an engine."""
    world = World.from_environment(device="cpu", timeout_s=300)
    engine = ENGINES[name]().build(world, "fp32")
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(world.rank))
    module: nn.Module = GPT2(dim=dim, depth=depth, heads=dim // 64).build({"input_ids": tokens})
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
    config = OIALRConfig(
        delay=4, frequency=2, rule=FixedFraction(0.25), limits=limits, layer_share_step=1.0, importance="weights"
    )
    run = make(name, optimizer_name, config)
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
    """Many updates, each of which changes shapes: r falls from 448, by two at first, by one from 308 to 154."""
    os.environ |= NO_COMPILED_PRODUCTS
    limits = RankLimits(max_drop=0.0065, min_fraction=0.05, round_to=1)
    config = OIALRConfig(
        delay=1, frequency=1, rule=FixedFraction(0.05), limits=limits, layer_share_step=1.0, importance="weights"
    )
    run = make(name, optimizer_name, config, dim=448, depth=1)
    row: Row = {}
    for update in range(updates + 1):
        run.step()
        if update in (10, updates):
            when = "first" if update == 10 else "last"
            row |= {
                f"{when}_r": max(run.oialr.r.values()),
                f"{when}_mib": live_bytes() / MIB,
                f"{when}_tensors": len(live()),
                f"{when}_objects": len(gc.get_objects()),
                f"{when}_rss_mib": rss_mib(),
            }
    return row


def rss_mib() -> float:
    """Resident set of this process, once the C library has given back what it keeps for later."""
    ctypes.CDLL(None).malloc_trim(0)
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
    parser.add_argument("--growing", nargs="+", default=["ddp", "fsdp", "zero3"], choices=list(ENGINES))
    parser.add_argument("--updates", type=int, default=200, help="0 leaves the long runs out")
    options = parser.parse_args()
    rows = earlier(options.out)
    for optimizer in ("MuonAdamW", "AdamW"):
        engines = [e for e in options.engines if optimizer == "AdamW" or not e.startswith("zero")]
        for name in dict.fromkeys(["ddp", *engines]):
            if not found(rows, "phases", name, optimizer):
                row = measure(options.processes, phases, name, optimizer)
                row |= ratios(row, found(rows, "phases", "ddp", optimizer) or row)
                rows.append({"kind": "phases", "engine": name, "optimizer": optimizer, **row})
                finish(rows, options.out, processes=options.processes)
    for name in options.growing if options.updates else ():
        if not found(rows, "updates", name, "AdamW"):
            row = measure(2, growth, name, "AdamW", options.updates)
            first = {"kind": "updates", "engine": name, "optimizer": "AdamW", "updates": options.updates}
            rows.append(first | row)
            finish(rows, options.out, processes=options.processes)
    for kind in ("phases", "updates"):
        finish([row for row in rows if row["kind"] == kind], None)


def found(rows: list[Row], kind: str, engine: str, optimizer: str) -> Row | None:
    """The row that has been measured, if it has."""
    wanted = (kind, engine, optimizer)
    return next((row for row in rows if (row["kind"], row["engine"], row["optimizer"]) == wanted), None)


def ratios(row: Row, reference: Row) -> Row:
    """What a process holds, and what its events take, over the reference's."""
    phases = ("dense", "low_rank", "conversion", "update")
    return {f"{phase}_ratio": row[f"{phase}_mib"] / reference[f"{phase}_mib"] for phase in phases}


if __name__ == "__main__":
    main()
