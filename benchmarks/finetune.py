"""SARA and Mo-SARA against full fine-tuning, PEFT's LoRA and PiSSA, and LoRA-XS, at about equal trained parameters.

The recipe `finetune_bert`, smaller: the first three of BERT's six layers, and which of four parts of the Python
documentation is a passage of 24 words from? Documents are in one part of the data only. Each method is trained with three
learning rates on seed 0; the rate with the best validation accuracy is trained with two more seeds. Test accuracy decides
nothing. LoRA's r = 2 sets the number of trained parameters; thresholds of SARA and Mo-SARA are those that come nearest to
it. Where the best rate was the highest of the three, all three were moved up by one. About 12 processor minutes, in
several processes of one thread each; an interrupted call goes on where it stopped.
Needs `oialr data fetch minilm` and `python-docs`, and PEFT.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import Row, arguments, earlier, finish
from benchmarks.finetune_methods import MeanPooled
from hpc_oialr.distributed import World
from hpc_oialr.finetune import MoSARA, expert_load
from hpc_oialr.finetune.methods import adaptable
from hpc_oialr.linalg.svd import svd
from hpc_oialr.lowrank import Selection
from hpc_oialr.method.rules import CumulativeSum
from hpc_oialr.models import PretrainedClassifier
from hpc_oialr.models.base import prepare_transformers
from hpc_oialr.serve.trained import load_model
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import train

RECIPE, LORA_R, CORE_R = "finetune_bert", 2, 48
CLASSES, LAYERS, WORKERS = ("c-api", "howto", "library", "whatsnew"), 3, 4
RIVALS = "benchmarks.finetune_methods"
LENGTH = [
    "--data", f"{RIVALS}.OnceRead", "--data.classes", f"[{', '.join(CLASSES)}]", "--data.per_class", "600",
    "--data.validation_fraction", "0.1", "--data.test_fraction", "0.2", "--data.words", "24",
    "--data.sequence_length", "32", "--model", f"{RIVALS}.MeanPooled", "--model.classes", str(len(CLASSES)),
    "--train.steps", "80", "--train.global_batch", "8", "--train.evaluations", "1", "--record.spectra", "false",
    "--checkpoint.every", "null", "--train.device", "cpu",
]  # fmt: skip
SEEDS = (0, 1, 2)
# Method, its settings and learning rates; {sara} and {mosara} are thresholds.
METHODS: dict[str, tuple[str, tuple[float, float, float]]] = {
    "full": ("Full", (1e-4, 3e-4, 1e-3)),
    "SARA": ("SARA --model.method.threshold {sara}", (1e-3, 3e-3, 1e-2)),
    "Mo-SARA": ("MoSARA --model.method.threshold {mosara}", (1e-2, 3e-2, 1e-1)),
    "LoRA (PEFT)": (f"{RIVALS}.PeftLoRA --model.method.r {LORA_R}", (3e-3, 1e-2, 3e-2)),
    "PiSSA (PEFT)": (f"{RIVALS}.PeftLoRA --model.method.r {LORA_R} --model.method.initial pissa", (1e-3, 3e-3, 1e-2)),
    "LoRA-XS": (f"{RIVALS}.LoRAXS --model.method.r {CORE_R}", (1e-3, 3e-3, 1e-2)),
}


def main() -> None:
    """Three rates on one seed, then the best of them on the others."""
    options = arguments(__doc__ or "").parse_args()
    rows = [row for row in earlier(options.out) if row["lr"] in METHODS[row["method"]][1]]
    with tempfile.TemporaryDirectory() as scratch:
        base = write_base(Path(scratch) / "base")
        chosen = thresholds(base)
        extra: dict[str, Any] = {"settings": [RECIPE, *LENGTH], "layers": LAYERS, "thresholds": chosen, **sizes(base)}

        def save() -> None:
            finish(sorted(rows, key=_order), options.out, **extra)

        _measure([(name, rate, SEEDS[0]) for name in METHODS for rate in METHODS[name][1]], (base, chosen), rows, save)
        extra["best_lr"] = best = {name: best_rate(rows, name) for name in METHODS}
        _measure([(name, rate, seed) for seed in SEEDS[1:] for name, rate in best.items()], (base, chosen), rows, save)
        save()


def write_base(folder: Path) -> str:
    """The first layers of the pretrained model, saved as it is."""
    from transformers import AutoModel

    prepare_transformers()
    AutoModel.from_pretrained(PretrainedClassifier().folder(), num_hidden_layers=LAYERS).save_pretrained(folder)
    return str(folder)


def sizes(base: str) -> dict[str, int]:
    """Parameters of the head, samples of each part."""
    config = load_config(RECIPE, [*LENGTH, "--model.path", base]).config
    assert isinstance(config.model, PretrainedClassifier)
    model, head = config.model.pretrained()
    splits = config.data.build()
    parts = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    held = sum(p.numel() for name in head for p in model.get_submodule(name).parameters())
    return {"head_parameters": held} | {
        f"{name}_samples": len(part) for name, part in parts.items() if part is not None
    }


def best_rate(rows: Sequence[Row], name: str) -> float:
    """The learning rate of the best validation accuracy on the first seed, the lower rate where it is equal."""
    mine = [row for row in rows if (row["method"], row["seed"]) == (name, SEEDS[0])]
    return float(max(mine, key=lambda row: (row["validation_accuracy"], -row["lr"]))["lr"])


def thresholds(base: str) -> dict[str, float]:
    """Of SARA and Mo-SARA, with about as many trained parameters as LoRA."""
    model, head = MeanPooled(path=base, classes=len(CLASSES)).pretrained()
    layers = [target.weight for target in adaptable(model, Selection(kinds=("Linear",)), head)]
    spectra = [(svd(weight).s, *weight.shape) for weight in layers]
    experts = MoSARA().experts
    counts: dict[str, Callable[[int, int, int], int]] = {
        "sara": lambda r, m, n: r * (m + n + 1),
        "mosara": lambda r, m, n: 2 * experts * r,
    }
    wanted = sum(LORA_R * (m + n) for _, m, n in spectra)
    found = {}
    for name, count in counts.items():
        grid = [round(float(t), 4) for t in np.geomspace(0.002, 0.999, 400)]
        found[name] = min(grid, key=lambda t: abs(_total(spectra, t, count) - wanted))
    return found


def _total(spectra: Sequence[tuple[Tensor, int, int]], threshold: float, count: Callable[[int, int, int], int]) -> int:
    rule = CumulativeSum(threshold)
    return sum(count(rule.choose(s, m, n), m, n) for s, m, n in spectra)


def _measure(
    tasks: Sequence[tuple[str, float, int]],
    given: tuple[str, dict[str, float]],
    rows: list[Row],
    save: Callable[[], None],
) -> None:
    """Run the tasks that ``rows`` lacks, some at a time."""
    known = {(row["method"], row["lr"], row["seed"]) for row in rows}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        running = [pool.submit(run, *task, *given) for task in tasks if task not in known]
        for done in as_completed(running):
            rows.append(done.result())
            save()


def run(name: str, lr: float, seed: int, base: str, chosen: dict[str, float]) -> Row:
    """Fine-tune once, on one thread."""
    torch.set_num_threads(1)
    method = METHODS[name][0].format(**chosen).split()
    words = [
        "--model.path",
        base,
        "--model.method",
        *method,
        *LENGTH,
        "--optimizer.lr",
        str(lr),
        "--train.seed",
        str(seed),
    ]
    with tempfile.TemporaryDirectory() as scratch:
        start = time.process_time()
        result: dict[str, Any] | None = train(
            load_config(RECIPE, words), Path(scratch) / "run", world=World.single("cpu")
        ).summary
        seconds = time.process_time() - start
        assert result is not None
        row = {
            "method": name,
            "lr": lr,
            "seed": seed,
            "trained": result["trainable_params"],
            "total": result["total_params"],
            "validation_accuracy": result["best_metric"],
            "test_accuracy": result["metric"],
            "cpu_s": round(seconds, 1),
        }
        if name == "Mo-SARA":
            loads = torch.stack(list(expert_load(load_model(Path(scratch) / "run")).values()))
            row |= {"load_min": float(loads.min()), "load_max": float(loads.max())}
    return row


def _order(row: Row) -> tuple[int, float, int]:
    return list(METHODS).index(row["method"]), row["lr"], row["seed"]


if __name__ == "__main__":
    main()
