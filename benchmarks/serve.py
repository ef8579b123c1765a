"""A factored model against a dense one in use: time of a forward pass, and size.

ViT-B/16 with random weights truncated to r = fraction k: dense, merged (a dense model made of it), factored (two thin
products a layer), and the trained form (three factors) for comparison; in bfloat16 the whole model is. All answer in
turn, so that drifts of the machine's speed meet all of them; times are medians, ratios medians over the rounds, and
`spread` is the 10th to 90th percentile of the ratio.
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.common import Row, arguments, finish, timed
from hpc_oialr import fold, merge
from hpc_oialr.lowrank import convert
from hpc_oialr.serve.factored import save_tensors


def file_mib(model: nn.Module) -> float:
    """Size of its safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_tensors(model, path)
        return path.stat().st_size / 2**20


def measure(base: nn.Module, fraction: float, dtype: str, batches: list[int], repeats: int) -> list[Row]:
    """A row a form and batch size."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = copy.deepcopy(base)
    convert(trained, fraction=fraction)
    models = {"dense": base, "merged": merge(trained), "factored": fold(trained), "three factors": trained}
    kind = getattr(torch, dtype)  # the model itself: autocast would cast every weight in every pass
    models = {name: copy.deepcopy(model).to(device, kind).requires_grad_(False) for name, model in models.items()}
    sizes = {name: file_mib(model) for name, model in models.items()}
    rows: list[Row] = []
    for batch in batches:
        images = torch.randn(batch, 3, 224, 224, device=device, dtype=kind)
        times = {name: np.array([]) for name in models}
        with torch.inference_mode():
            for i in range(repeats + 2):
                for name, model in models.items():
                    seconds = timed(partial(model, pixel_values=images))
                    times[name] = np.append(times[name], seconds) if i >= 2 else times[name]
        for name, own in times.items():
            ratios = own / times["dense"]
            rows.append({
                "model": "ViT-B/16",
                "dtype": dtype,
                "r_fraction": fraction,
                "form": name,
                "batch": batch,
                "time_ratio": float(np.median(ratios)),
                "spread": [float(x) for x in np.percentile(ratios, (10, 90))],
                "median_ms": 1e3 * float(np.median(own)),
                "images_per_s": batch / float(np.median(own)),
                "file_mib": sizes[name],
                "size_ratio": sizes[name] / sizes["dense"],
            })  # fmt: skip
    return rows


def main() -> None:
    """Measure each fraction beside the same dense model."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(num_labels=1000)).requires_grad_(False).eval()
    rows: list[Row] = []
    for dtype in options.dtypes:
        for fraction in (0.25, 0.125):
            rows += measure(base, fraction, dtype, options.batches, options.repeats)
    finish(rows, options.out)


if __name__ == "__main__":
    main()
