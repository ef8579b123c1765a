"""What docs/integrations.md says is what runs: each of its examples, whole and resumed, on one process and on two."""

from __future__ import annotations

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from support.spawn import spawn

from hpc_oialr import OIALR, low_rank_layers, merge

PAGE = (Path(__file__).resolve().parents[2] / "docs/integrations.md").read_text()
EPOCHS = 3


def example(heading: str) -> dict[str, Any]:
    """The names that the page's first block and the block under a heading define."""
    common = re.findall(r"```python\n(.*?)```", PAGE.partition("\n## ")[0], re.DOTALL)
    own = re.findall(r"```python\n(.*?)```", PAGE.partition(f"\n## {heading}")[2].partition("\n## ")[0], re.DOTALL)
    names: dict[str, Any] = {}
    for block in (*common, own[0]):
        exec(compile(block, f"docs/integrations.md, {heading}", "exec"), names)
    return names


def trained(rank: int, size: int, heading: str, folder: Path, resume: Path | None) -> tuple[Any, float, dict[str, int]]:
    """The dense weights, the accuracy and r at the end of an example."""
    warnings.simplefilter("default")
    folder.mkdir(parents=True, exist_ok=True)
    used, step = set(), OIALR.step

    def counted(self: OIALR) -> Any:
        used.add(self.engine.world.size)
        return step(self)

    with mock.patch.object(OIALR, "step", counted):
        model, accuracy = example(heading)["train"](folder, EPOCHS, resume=resume)
    assert used == {size}, "the library trains each process alone"
    r = {name: layer.r for name, layer in low_rank_layers(model).items()}
    return merge(model).state_dict(), accuracy, r


def trained_twice(rank: int, size: int, heading: str, folder: Path, checkpoint: str) -> tuple[Any, Any]:
    """The example whole, and resumed in the same process: a library takes seconds to load."""
    whole = trained(rank, size, heading, folder / "whole", None)
    return whole, trained(rank, size, heading, folder / "resumed", folder / "whole" / checkpoint)


# What resumes after one epoch, on one process and on two; the library.
EXAMPLES = {
    "A loop of your own": (("1.pt", "1.pt"), "torch"),
    "Accelerate": (("1", "1"), "accelerate"),
    "transformers' Trainer": (("checkpoint-32", "checkpoint-16"), "accelerate"),
    "Lightning": (("epoch=0.ckpt", "epoch=0.ckpt"), "lightning"),
}


@pytest.mark.parametrize("heading", EXAMPLES)
def test_example(heading: str, tmp_path: Path) -> None:
    checkpoints, needs = EXAMPLES[heading]
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed")
    two = tmp_path / "2 whole"
    runs = (
        list(spawn(trained_twice, 1, heading, tmp_path / "1", checkpoints[0])[0]),
        [
            *spawn(trained, 2, heading, two, None),
            *spawn(trained, 2, heading, tmp_path / "2 resumed", two / checkpoints[1]),
        ],
    )
    for found in runs:
        weights, accuracy, r = found[0]
        assert {name.rpartition("net.")[2] for name in r} == {"0", "2"}
        assert all(each <= 12 for each in r.values()), "not cut"
        assert accuracy > 0.5
        for each in found:
            assert each[1:] == (accuracy, r)
            assert all(torch.equal(weights[name], tensor) for name, tensor in each[0].items())
