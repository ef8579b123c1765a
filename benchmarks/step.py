"""A whole training step of ViT-B/16 (transformers), dense against low-rank: time, memory, trained share.

Forward, backward and AdamW step; random images and labels; the low-rank models have random weights
truncated to r = fraction k. Ratios are to the dense model, the two measured in turn in one run.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.common import Row, arguments, finish, time_ratios
from hpc_oialr import dense_parameters, trainable_parameters
from hpc_oialr.lowrank import convert
from hpc_oialr.record.memory import MemoryMeter


class Run:
    """A model with its optimizer; calling it does one step."""

    def __init__(self, model: nn.Module, batch: int, dtype: str) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(device)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)
        self.images = torch.randn(batch, 3, 224, 224, device=device)
        self.labels = torch.randint(0, 1000, (batch,), device=device)
        self.device, self.autocast = device, dtype == "bfloat16"

    def __call__(self) -> None:
        """Forward, backward, optimizer step."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
            loss = self.model(pixel_values=self.images, labels=self.labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak_bytes(self) -> int:
        """Peak of tensor memory over one step, of this model alone."""
        meter = MemoryMeter(lambda: (self.model, self.optimizer), self.device)
        with meter.probe():
            self()
        return int(meter.peak_bytes)


def main() -> None:
    """Measure each fraction against the same dense model."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(num_labels=1000))
    rows: list[Row] = []
    for dtype in options.dtypes:
        for fraction in (0.5, 0.25, 0.125):
            rows.append(measure(base, fraction, dtype, options.batch, options.repeats))
    finish(rows, options.out)


def measure(base: nn.Module, fraction: float, dtype: str, batch: int, repeats: int) -> Row:
    """One row."""
    low = copy.deepcopy(base)
    convert(low, fraction=fraction)
    runs = {"dense": Run(copy.deepcopy(base), batch, dtype), "low-rank": Run(low, batch, dtype)}
    ratios, dense_s = time_ratios(runs, "dense", repeats=repeats)
    return {
        "model": "ViT-B/16",
        "batch": batch,
        "dtype": dtype,
        "r_fraction": fraction,
        "time_ratio": ratios["low-rank"],
        "trainable_share": trainable_parameters(low) / dense_parameters(low),
        "peak_memory_ratio": runs["low-rank"].peak_bytes() / runs["dense"].peak_bytes(),
        "dense_s": dense_s,
    }


if __name__ == "__main__":
    main()
