"""What a conversion costs, by how it chooses the directions it keeps: the weights, or the second moments around them.

A small ViT on CIFAR-10 is trained dense up to shares of its run; there copies of it are converted at several shares of k
by each setting of ``importance`` and ``moments``, after the same last steps. Judged by held-out training images.

    python -m benchmarks.bases --data FOLDER --out benchmarks/results/bases_conversion.json
    python -m benchmarks.bases --data FOLDER --out benchmarks/results/bases_windows.json \\
        --steps 20 8 4 2 1 --fractions 0.5 0.25    # by inputs, gathered in so many last steps
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cifar.images import load, normalised
from benchmarks.cifar.training import _Run
from benchmarks.cifar.variants import Variant
from benchmarks.common import Row, arguments, finish
from hpc_oialr import OIALR, OIALRConfig, RankLimits

EPOCHS, DELAYS, FRACTIONS, STEPS = 20.0, (0.1, 0.3), (0.5, 0.25, 0.125), 20
FIGURES = ("accuracy_before", "loss_before", "accuracy_after", "loss_after")
CHOICES: list[dict[str, Any]] = [
    {"importance": "weights"},
    {"importance": "inputs", "moments": "diagonal"},
    {"importance": "inputs", "moments": "full"},
    {"importance": "inputs and gradients", "moments": "full"},
]


def main() -> None:
    """Train once, convert copies at each of :data:`DELAYS`."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help="as for benchmarks.cifar")
    parser.add_argument("--size", default="small", help="a size of benchmarks.cifar; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs="+", help="of gathering, for full moments of inputs alone")
    parser.add_argument("--fractions", type=float, nargs="+", default=FRACTIONS, help="r over k after the conversion")
    options = parser.parse_args()
    choices = CHOICES
    if options.steps:
        choices = [{"importance": "inputs", "moments": "full", "moments_steps": steps} for steps in options.steps]
    torch.set_num_threads(1)
    data = load(options.data, options.size, validation=True)
    run = _Run(Variant(name="dense", epochs=EPOCHS, batch=data.size.batch), data, options.seed)
    starts = {max(1, round(delay * run.steps)) - STEPS: delay for delay in DELAYS}
    rows: list[Row] = []
    batches = (batch for _ in range(int(EPOCHS)) for batch in run.batches.epoch())
    with run.clock.running():
        for pixels, labels in batches:
            if run.done in starts:
                last = [(pixels, labels), *(next(batches) for _ in range(STEPS - 1))]
                rows += converted(run, last, starts[run.done], choices, options.fractions)
                for batch in last:
                    run.step(*batch)
                if run.done - STEPS == max(starts):
                    break
            else:
                run.step(pixels, labels)
    finish(rows, options.out, seed=options.seed, size=options.size, moments_steps=STEPS)


def converted(
    run: _Run,
    batches: list[tuple[Tensor, Tensor]],
    delay: float,
    choices: Sequence[dict[str, Any]],
    fractions: Sequence[float],
) -> list[Row]:
    """Accuracy and loss before and after the conversion of copies of the run's model, trained for the last steps."""
    rows: list[Row] = []
    before: list[float] = []
    for choice in choices:
        model, optimizer = copy.deepcopy((run.plain, run.optimizer))
        limits = RankLimits(at_conversion=fractions[0])
        settings = {"delay": STEPS, "moments_steps": STEPS, "limits": limits} | choice
        oialr = OIALR(model, optimizer, OIALRConfig(**settings))
        for i, (pixels, labels) in enumerate(batches, start=1):
            run.criterion(oialr.model(pixel_values=pixels).logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if i < STEPS:
                oialr.step()
        # Gathering changes nothing: all copies are the same so far.
        before = before or judge(model, run)
        for fraction in fractions:
            twin = copy.deepcopy(oialr)
            twin.config.limits = RankLimits(at_conversion=fraction, round_to=8)
            report = twin.step()
            assert report is not None
            named = zip(FIGURES, before + judge(twin.module, run), strict=True)
            row = {"delay": delay, "fraction": fraction, "moments": "", **choice, **dict(named)}
            rows.append({**row, "conversion_s": report.seconds})
            print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def judge(model: nn.Module, run: _Run) -> list[float]:
    """Accuracy (%) and cross-entropy."""
    model.eval()
    images, labels = run.images.test_images, run.images.test_labels
    logits = torch.cat([model(pixel_values=normalised(part)).logits for part in images.split(500)])
    model.train()
    right = (logits.argmax(1) == labels).double().mean()
    return [100 * float(right), float(nn.functional.cross_entropy(logits, labels))]


if __name__ == "__main__":
    main()
