"""A factored model against a dense one in use: time of a forward pass, and size.

ViT-B/16 and the demo's model with random weights truncated to r = fraction k: dense, factored (two thin products a
layer), and as trained (three factors). A merged model is the dense one with other numbers, and takes its time.

All answer in turn, so that drifts of the machine's speed meet all of them; times are medians, ratios medians over the
rounds, `spread` their 10th and 90th percentile. On a CPU: seconds of the processor, of one thread, so that other work on
the machine is not counted; on a GPU the time until the answer is there.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.common import Row, arguments, earlier, finish
from hpc_oialr import fold
from hpc_oialr.lowrank import convert
from hpc_oialr.serve.factored import save_tensors


def seconds(function: Callable[[], object]) -> float:
    """Of one call."""
    if not torch.cuda.is_available():
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def file_mib(model: nn.Module) -> float:
    """Size of its safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_tensors(model, path)
        return path.stat().st_size / 2**20


MODELS = {
    "ViT-B/16": {"num_labels": 1000},
    "demo": {
        **{"image_size": 28, "patch_size": 14, "num_channels": 1, "hidden_size": 512, "num_hidden_layers": 2},
        **{"num_attention_heads": 8, "intermediate_size": 2048, "num_labels": 10},
    },
}


def measure(name: str, base: nn.Module, fraction: float, batches: list[int], repeats: int) -> list[Row]:
    """A row a form and batch size."""
    device, config = "cuda" if torch.cuda.is_available() else "cpu", base.config
    trained = copy.deepcopy(base)
    convert(trained, fraction=fraction)
    forms = {"dense": copy.deepcopy(base), "factored": fold(trained), "as trained": trained}
    models = {form: model.to(device).requires_grad_(False) for form, model in forms.items()}
    sizes = {form: file_mib(model) for form, model in models.items()}
    rows: list[Row] = []
    for batch in batches:
        images = torch.randn(batch, config.num_channels, config.image_size, config.image_size, device=device)
        calls = [partial(model, pixel_values=images) for model in models.values()]
        with torch.inference_mode():
            rounds = [[seconds(call) for call in calls] for _ in range(repeats + 1)]
        times = np.array(rounds[1:])  # in the first one kernels are chosen
        for form, own in zip(models, times.T, strict=True):
            ratios = own / times[:, 0]
            rows.append({
                "model": name,
                "r_fraction": fraction,
                "form": form,
                "batch": batch,
                "time_ratio": float(np.median(ratios)),
                "spread": [float(x) for x in np.percentile(ratios, (10, 90))],
                "median_ms": 1e3 * float(np.median(own)),
                "file_mib": sizes[form],
                "size_ratio": sizes[form] / sizes["dense"],
            })  # fmt: skip
    return rows


def main() -> None:
    """Measure each fraction beside the same dense model."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=["ViT-B/16", "demo"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    # What an earlier call measured of other models and sizes stays.
    again = {(name, batch) for name in options.models for batch in options.batches}
    rows = [row for row in earlier(options.out) if (row["model"], row["batch"]) not in again]
    for name in options.models:
        base = ViTForImageClassification(ViTConfig(**MODELS[name])).eval()
        for fraction in (0.25, 0.125):
            rows += measure(name, base, fraction, options.batches, options.repeats)
    finish(rows, options.out)


if __name__ == "__main__":
    main()
