"""Bytes that a process hands to collectives in one training step, counted, against the formulas.

ViT-B/16 (transformers) under every engine on two gloo processes, dense and at r = k/4. `gradient_bytes`:
all-reduces under DDP, reduce-scatters under FSDP; `gather_bytes`: all-gathers of parameters; both the size of
the whole tensors that take part, whatever the algorithm makes of them on the wire. Formulas, 4 bytes a number:

- ddp: every trained number once, r^2 for a low-rank layer;
- fsdp: every trained number once for the gradients, every parameter twice for the gathers;
- tensor: activations, tokens x r for a low-rank layer forward and the same backward inside a pair; this table
  only counts them.

`of_dense_ddp` is the traffic of gradients over dense DDP's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.common import Row, arguments, finish
from benchmarks.processes import ENGINES, on_processes
from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits, trainable_parameters
from hpc_oialr.distributed import World

COUNTABLE = ("ddp", "fsdp", "tensor")
OFF = torch.amp.GradScaler("cpu", enabled=False)
COUNTED: Counter[str] = Counter()
# For each collective, which argument is the whole tensor, by position and by name.
WHOLE = {
    "all_reduce": (0, "tensor"),
    "broadcast": (0, "tensor"),
    "all_to_all_single": (0, "output"),
    "all_gather_into_tensor": (0, "output_tensor"),
    "all_gather_single": (0, "output"),
    "reduce_scatter_tensor": (1, "input"),
    "reduce_scatter_single": (1, "input"),
}


def count_collectives() -> None:
    """Count the bytes of every collective that Python code starts."""
    for name, (position, keyword) in WHOLE.items():
        original = getattr(dist, name, None)
        if original is not None:
            setattr(dist, name, counting(name, original, position, keyword))


def counting(name: str, original: Callable[..., Any], position: int, keyword: str) -> Callable[..., Any]:
    """``original``, and a look at what it is given."""

    def counted(*args: Any, **kwargs: Any) -> Any:
        whole = args[position] if len(args) > position else kwargs[keyword]
        before = COUNTED.copy()
        result = original(*args, **kwargs)
        if before == COUNTED:
            # Not a second time where one name of torch's calls another.
            COUNTED[name] += whole.nbytes
        return result

    return counted


def buckets(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A hook of DDP, whose all-reduce starts in C++: count, then do the same."""
    COUNTED["all_reduce"] += bucket.buffer().nbytes
    work = dist.group.WORLD.allreduce([bucket.buffer().div_(dist.get_world_size())])
    return work.get_future().then(lambda done: done.value()[0])


# DDP looks at the types themselves, not at their names.
buckets.__annotations__ |= {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}


def measure(name: str, fraction: float, depth: int) -> Row:
    """One engine, dense (fraction 1) or low-rank."""
    count_collectives()
    world = World.from_environment(device="cpu", timeout_s=300)
    engine = ENGINES[name]().build(world, "fp32")
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_labels=1000, num_hidden_layers=depth))
    engine.place(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    delay = 1 if fraction < 1 else 10**9
    limits = RankLimits(at_conversion=min(1.0, fraction))
    config = OIALRConfig(delay=delay, frequency=10**6, rule=FixedFraction(0.25), limits=limits, importance="weights")
    oialr = OIALR(model, optimizer, config, engine=engine)
    if isinstance(oialr.model, DistributedDataParallel):
        oialr.model.register_comm_hook(None, buckets)
    if fraction < 1:
        oialr.step()
    batch = 2
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))
    for _ in range(2):
        # The second step: DDP has its buckets by then.
        COUNTED.clear()
        engine.backward(oialr.model(pixel_values=images, labels=labels).loss, OFF)
        optimizer.zero_grad()
    trained, total = trainable_parameters(model), sum(p.numel() for p in model.parameters())
    gradients = counted_as("all_reduce", "reduce_scatter")
    assert gradients, f"no collective of {name}'s gradients was seen"
    formulas = {"ddp": (4 * trained, 0), "fsdp": (4 * trained, 8 * total), "tensor": (None, None)}[name]
    return {
        "engine": name,
        "r_fraction": fraction,
        "trained": trained,
        "parameters": total,
        "gradient_bytes": gradients,
        "gradient_formula": formulas[0],
        "gather_bytes": counted_as("all_gather"),
        "gather_formula": formulas[1],
    }


def counted_as(*kinds: str) -> int:
    """Bytes of the collectives of these kinds."""
    return sum(count for name, count in COUNTED.items() if name.startswith(kinds))


def main() -> None:
    """Every engine, dense and low-rank."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--depth", type=int, default=12, help="12 is ViT-B/16")
    parser.add_argument("--engines", nargs="+", default=COUNTABLE, choices=COUNTABLE)
    options = parser.parse_args()
    rows: list[Row] = []
    for name in options.engines:
        for fraction in (1.0, 0.25):
            rows.append(on_processes(options.processes, measure, name, fraction, options.depth)[0])
    dense = next((row["gradient_bytes"] for row in rows if row["engine"] == "ddp"), None)
    for row in rows:
        row["of_dense_ddp"] = row["gradient_bytes"] / dense if dense and row["engine"] != "tensor" else None
    finish(rows, options.out, processes=options.processes, depth=options.depth)


if __name__ == "__main__":
    main()
