from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from hpc_oialr.errors import MissingExtraError
from hpc_oialr.train.recorder import TensorBoard


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'hpc_oialr\[tensorboard\]'"):
        TensorBoard(tmp_path, 0)


def test_numbers_of_a_row(tmp_path, monkeypatch):
    scalars = []
    writer = SimpleNamespace(add_scalar=lambda *scalar: scalars.append(scalar), close=lambda: None)
    module = SimpleNamespace(SummaryWriter=lambda folder, purge_step: scalars.append(purge_step) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    board = TensorBoard(tmp_path, 4)
    board.write({"step": 5, "loss": 0.5})
    board.write({"step": 5, "split": "test", "metric_name": "test_accuracy", "metric": 0.9})
    board.close()
    assert scalars == [5, ("train/loss", 0.5, 5), ("test/metric", 0.9, 5)]
