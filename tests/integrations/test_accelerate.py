"""Accelerate, the real library: conversion, cuts and resumed runs of the same bits; what cannot work is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.small_training import batch, settings, small_model
from support.spawn import launch_environment, spawn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from hpc_oialr import OIALRConfig
from hpc_oialr.errors import CheckpointError, ModelError
from hpc_oialr.integrations.launch import require_all_processes
from hpc_oialr.integrations.state_files import read_state

accelerate = pytest.importorskip("accelerate")
from hpc_oialr.integrations.accelerate import AcceleratedOIALR, require_supported  # noqa: E402

STEPS, ACCUMULATED = 12, 2
# Conversion after step 4, updates after 7 and 10; sums for the next are gathered all along.
CONFIG = settings(moments_steps=3, stability_frequency=2)
pytestmark = pytest.mark.filterwarnings("default")


class Run:
    """The loop of the docs, with a folder to resume from."""

    def __init__(self, *, before: bool = False, config: OIALRConfig = CONFIG, **plugins: Any) -> None:
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED, **plugins)
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if before:
            self.oialr = AcceleratedOIALR(self.accelerator, model, optimizer, config)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if not before:
            self.oialr = AcceleratedOIALR(self.accelerator, self.model, self.optimizer, config)

    def train(self, steps: int) -> Run:
        rank, size = self.accelerator.process_index, self.accelerator.num_processes
        for t in range(self.oialr.t * ACCUMULATED, (self.oialr.t + steps) * ACCUMULATED):
            with self.accelerator.accumulate(self.model):
                x, y = batch(t)
                self.accelerator.backward(cross_entropy(self.model(x[rank::size]), y[rank::size]))
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.oialr.step()
        return self

    def result(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        weights = self.accelerator.get_state_dict(self.model)
        return self.oialr.r, {name: tensor.clone() for name, tensor in weights.items()}


def same(a: Any, b: Any) -> bool:
    (r, weights), (s, others) = a, b
    return bool(r == s and weights.keys() == others.keys() and all(torch.equal(weights[k], others[k]) for k in weights))


def resumed(rank: int, size: int, folder: Path, stops: tuple[int, ...] = (6, 9)) -> Any:
    """Whether a run that was saved and one resumed from there are the uninterrupted one; its r and weights."""
    warnings.simplefilter("default")
    if size > 1:
        with pytest.raises(ModelError, match=r"was not prepared, and 2 processes .*accelerator.prepare\(model"):
            Run(before=True)
    whole = Run().train(STEPS).result()
    for stop in stops:
        run = Run().train(stop)
        run.accelerator.save_state(str(folder / str(stop)))
        assert same(run.train(STEPS - stop).result(), whole), f"saving at {stop} changed the run"
        again = Run()
        again.oialr.load_state(folder / str(stop))
        assert again.oialr.t == stop
        assert same(again.train(STEPS - stop).result(), whole), f"resumed at {stop}"
    return whole


def test_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    r, weights = resumed(0, 1, tmp_path, (3, 6, 9))
    assert r.keys() == {"0", "2"}
    assert max(r.values()) < 12, "not cut"
    assert {"0.U", "0.S", "0.Vh"} <= weights.keys()
    assert same(Run(before=True).train(STEPS).result(), (r, weights))


def test_two_processes_resume_too(tmp_path: Path) -> None:
    first, second = spawn(resumed, 2, tmp_path)
    assert same(first, second)
    assert read_state(tmp_path / "6")["tensors"][1] > 0, "each rank has sums of its own"
    alone = Run()
    alone.accelerator.load_state(str(tmp_path / "6"))
    alone.train(STEPS - 6)
    assert alone.oialr.r == first[0], "on another number of processes"
    torch.testing.assert_close(alone.result()[1]["4.weight"], first[1]["4.weight"], rtol=1e-3, atol=1e-4)


def test_what_accelerate_does_by_other_engines_is_refused() -> None:
    kinds = accelerate.utils.DistributedType
    for changes, message in (
        ({"distributed_type": kinds.DEEPSPEED}, "Accelerate's DEEPSPEED .*oialr train --engine DeepSpeed"),
        ({"distributed_type": kinds.FSDP}, "FSDP of version 1 .*set fsdp_version: 2"),
        ({"parallelism_config": SimpleNamespace(tp_enabled=True)}, "parallelism_config with tp .*use DDP or FSDP"),
        ({"mixed_precision": "fp8"}, "fp8, which replaces layers, .*use bf16"),
    ):
        plain = {"distributed_type": kinds.NO, "mixed_precision": "no", "parallelism_config": None}
        accelerator = SimpleNamespace(**plain, state=SimpleNamespace(fsdp_plugin=None))
        require_supported(accelerator)
        vars(accelerator).update(changes)
        with pytest.raises(ModelError, match=message):
            require_supported(accelerator)


def test_processes_that_would_train_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in launch_environment(0, 2, 29500).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match=r"started 2 processes, but The library has 1 .*\. Do this, or start one"):
        require_all_processes(1, "The library", "Do this")
    require_all_processes(2, "The library", "Do this")
    monkeypatch.delenv("RANK")  # as in processes that Lightning starts
    require_all_processes(1, "The library", "Do this")


def shuffled(rank: int, size: int, folder: Path, seedable: bool) -> list[str]:
    """What is said when a state is saved whose loader shuffles."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = Run(dataloader_config=accelerate.DataLoaderConfiguration(use_seedable_sampler=seedable))
        run.accelerator.prepare(DataLoader(TensorDataset(torch.zeros(8, 2)), shuffle=True))
        run.accelerator.save_state(str(folder))
    return [str(each.message) for each in caught if "order of the samples" in str(each.message)]


def test_an_order_that_is_not_saved_is_told(tmp_path: Path) -> None:
    assert [len(said) for said in spawn(shuffled, 2, tmp_path, False)] == [1, 1]
    assert spawn(shuffled, 2, tmp_path, True) == [[], []]
    assert spawn(shuffled, 1, tmp_path, False) == [[]]  # from torch's own generator, which is saved


def test_checkpoints_without_the_controllers_state_are_refused(tmp_path: Path) -> None:
    run = Run().train(6)
    run.accelerator.save_state(str(tmp_path))
    path = tmp_path / "oialr.json"
    kept = path.read_text()
    for damage, message in (
        (path.unlink, "oialr.json is missing: the checkpoint was made without OIALR"),
        (lambda: path.write_text(kept[:50]), "oialr.json is damaged .*earlier checkpoint"),
        (lambda: path.write_text(kept.replace('"version": 1', '"version": 2')), "has version 2"),
    ):
        damage()
        with pytest.raises(CheckpointError, match=message):
            Run().accelerator.load_state(str(tmp_path))
    path.write_text(kept)
    (tmp_path / "oialr-0-of-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="oialr-0-of-1.safetensors is missing, which oialr.json beside it names"):
        Run().accelerator.load_state(str(tmp_path))


def sharded(rank: int, size: int, folder: Path) -> Any:
    """FSDP2, which accelerate offers for GPUs only: its choice is forced here, all the rest is its own code."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerate.Accelerator(cpu=True)
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type=kind)
        for state in (PartialState, AcceleratorState):
            state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        assert isinstance(next(Run().model.parameters()), DTensor)
        whole = resumed(rank, size, folder / kind, (9,))
    return whole


def test_fsdp2_resumes_too(tmp_path: Path) -> None:
    (r, weights), (s, none) = spawn(sharded, 2, tmp_path)
    assert r == s
    assert r.keys() == {"0", "2"}
    assert {"0.U", "0.S", "0.Vh"} <= weights.keys()
    assert not none, "accelerate gathers on the first process"
