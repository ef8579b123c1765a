from __future__ import annotations

import json
import logging

import pytest
import torch
from support.small_disk import fill, small_disk
from support.spawn import spawn
from torch.distributed.checkpoint import filesystem

from hpc_oialr.distributed import World
from hpc_oialr.errors import CheckpointError
from hpc_oialr.train.checkpoint_store import CheckpointStore

TENSORS = {
    "model.w": torch.randn(3, 4),
    "model.b16": torch.randn(5).to(torch.bfloat16),
    "optimizer.w.step": torch.tensor(7.0),
    "optimizer.w.exp_avg": torch.randn(3, 4, dtype=torch.float64),
    "rng.0.cpu": torch.arange(11, dtype=torch.uint8),
    "model.counter": torch.tensor(5),
}


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", World.single("cpu"), keep=2)
    for step in (1, 2, 3):
        store.save(step, {name: tensor + step for name, tensor in TENSORS.items()}, {"step": step, "x": 0.1 + 0.2})
    return store


def test_round_trip_is_bitwise(store):
    found = store.read(3, "")
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor + 3)
    assert store.read_state(3) == {"step": 3, "x": 0.1 + 0.2}


def test_tensors_of_the_host_are_written_without_a_gpu(store, monkeypatch):
    """A thread beside the training must not touch one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", None)
    store.save(4, TENSORS, {"step": 4})
    assert torch.equal(store.read(4, "model.")["w"], TENSORS["model.w"])


def test_the_last_ones_stay_and_nothing_else(store):
    assert store.steps() == [2, 3]
    assert sorted(path.name for path in store.folder.iterdir()) == ["step_00000002", "step_00000003"]


def test_nothing_is_pickled(store):
    assert {path.suffix for path in store.path(3).iterdir()} == {".json", ".safetensors"}


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [flip_a_bit, cut_in_half, lambda path: path.unlink()], ids=["flip", "torn", "missing"])
@pytest.mark.parametrize("suffix", [".safetensors", "state.json", "manifest.json"])
def test_a_damaged_one_is_passed_over(store, caplog, harm, suffix):
    harm(next(path for path in store.path(3).iterdir() if path.name.endswith(suffix)))
    with caplog.at_level(logging.WARNING, "hpc_oialr"):
        assert store.latest() == 2
    assert "step_00000003 is damaged" in caplog.text
    assert "using the one before it" in caplog.text


def test_all_damaged(store):
    for step in store.steps():
        (store.path(step) / "state.json").unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints in .* are damaged"):
        store.latest()


def test_none(tmp_path):
    assert CheckpointStore(tmp_path, World.single("cpu")).latest() is None


def test_a_draft_left_by_a_kill_is_no_checkpoint(store):
    draft = store.folder / ".step_00000004.draft"
    draft.mkdir()
    (draft / "state.json").write_text("{}")
    assert store.latest() == 3
    store.save(4, TENSORS, {"step": 4})
    assert not draft.exists()
    assert store.latest() == 4


def a_full_disk(rank, size, disk):
    world = World.from_environment(device="cpu", timeout_s=60)
    store = CheckpointStore(disk / "checkpoints", world, keep=2)
    found = []
    for step in (1, 2, 3):
        other = fill(disk, left=0) if rank == 0 and step == 2 else None
        world.barrier()
        try:
            store.save(step, TENSORS, {"step": step})
        except CheckpointError as error:
            found.append(str(error))
        if other:
            other.unlink()
        world.barrier()
    return [found, store.steps(), sorted(path.name for path in store.folder.iterdir())]


def test_no_room_on_two_processes(tmp_path):
    with small_disk(tmp_path / "small", kib=200) as disk:
        one, other = spawn(a_full_disk, 2, disk)
    assert one == other
    (message,), steps, names = one
    assert "step_00000002 cannot be written (OSError: [Errno 28] No space left on device)" in message
    assert steps == [1, 3]
    assert names == ["step_00000001", "step_00000003"]


def test_wrong_shape_and_missing_name(store):
    with pytest.raises(CheckpointError, match=r"holds model.w in shape \(3, 4\); \(2, 4\) is needed"):
        store.read_into(3, {"model.w": torch.empty(2, 4)})
    with pytest.raises(CheckpointError, match="holds model.v not at all"):
        store.read_into(3, {"model.v": torch.empty(1)})


def test_manifest_lists_every_file(store):
    files = json.loads((store.path(3) / "manifest.json").read_text())["files"]
    assert {*files, "manifest.json"} == {path.name for path in store.path(3).iterdir()}
