"""Checkpoints on disk: written as a draft, checksummed, renamed; damaged ones are skipped.

A checkpoint is a folder ``RUN/checkpoints/step_00000123`` of safetensors files (torch.distributed.checkpoint, one or
more per rank), ``state.json`` and ``manifest.json`` with the sha256 of all others. Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hpc_oialr.distributed import World
from hpc_oialr.errors import CheckpointError, FolderLostError
from hpc_oialr.outputs import sha256_of
from hpc_oialr.record.files import write_atomically

log = logging.getLogger(__name__)

STATE, MANIFEST = "state.json", "manifest.json"


class CheckpointStore:
    """The last ``keep`` checkpoints of one run. All methods but :meth:`steps` are collective calls.

    ``lost`` returns why nothing may be written there any more, "" if it may; called on rank 0.
    """

    def __init__(self, folder: Path, world: World, *, keep: int = 2, lost: Callable[[], str] = lambda: "") -> None:
        self.folder, self.world, self.keep, self.lost = folder, world, keep, lost

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after ``step`` steps."""
        return self.folder / f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Steps of all checkpoints that were completed, ascending; some may be damaged."""
        return sorted(int(path.name[5:]) for path in self.folder.glob("step_*") if path.name[5:].isdigit())

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write one checkpoint; it appears only when complete and on disk.

        A tensor that all ranks have is written once, DTensors as their shards. ``state`` is the rest, fit for JSON,
        from rank 0. On all ranks CheckpointError if one cannot write (earlier checkpoints stay), FolderLostError if
        the run's folder is gone, or taken by another process.
        """
        reason = self.world.broadcast_object(self.lost() if self.world.is_main else "")
        if reason:
            raise FolderLostError(f"{reason}; step {step} cannot be saved, and the run ends.")
        target, draft = self.path(step), self.folder / f".step_{step:08d}.draft"
        main = self.world.is_main
        with self._together(target, draft):
            if main:
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
        with self._together(target, draft):
            writer = HuggingFaceStorageWriter(str(draft), save_distributed=True)
            if self.world.device.type == "cpu":
                # Otherwise it waits for the first GPU's default stream, which in a thread beside the training would use
                # another rank's GPU, and break a CUDA graph that is being captured.
                writer.per_thread_copy_ahead = 0
            alone = self.world.size == 1
            # Not on several ranks: a thread that writes would change the filters of the main one.
            with _without_warning() if alone else nullcontext():
                save(dict(tensors), storage_writer=writer, process_group=self.world.group, no_dist=alone)
            if main:
                write_atomically(draft / STATE, json.dumps(state))
        with self._together(target, draft):
            mine = self._checksums(draft, sorted(path.name for path in draft.iterdir()))
        sums = self._gather(mine)
        with self._together(target, draft):
            if main:
                manifest = {"version": 1, "step": step, "files": sums}
                write_atomically(draft / MANIFEST, json.dumps(manifest))
                _sync_folder(draft)
                shutil.rmtree(target, ignore_errors=True)
                draft.replace(target)
                _sync_folder(self.folder)
                old = [self.path(step) for step in self.steps()[: -self.keep]]
                for path in (*old, *self.folder.glob(".step_*.draft")):
                    shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _together(self, target: Path, draft: Path) -> Iterator[None]:
        """Synchronise ranks at the end; an error on one is raised on all."""
        failure = ""
        try:
            yield
        except (OSError, CheckpointException) as error:
            cause: BaseException = error
            if isinstance(error, CheckpointException):
                # It carries the failures of all ranks; the first is enough.
                cause = next((each for each, _ in error.failures.values()), error)
            failure = f"{type(cause).__name__}: {cause}"
        failures = [text for text in self.world.all_gather_object(failure) if text]
        if failures:
            if self.world.is_main:
                shutil.rmtree(draft, ignore_errors=True)
            raise CheckpointError(
                f"{target} cannot be written ({failures[0]}). Make room, or let {target.parent} be a link to a "
                "larger disk; earlier checkpoints are as they were."
            )

    def _checksums(self, folder: Path, names: list[str]) -> dict[str, str]:
        """sha256 of this rank's share of the files."""
        return {name: sha256_of(folder / name) for name in names[self.world.rank :: self.world.size]}

    def _gather(self, mine: dict[str, str]) -> dict[str, str]:
        """All ranks' checksums, by name."""
        parts = self.world.all_gather_object(mine)
        return dict(sorted(item for part in parts for item in part.items()))

    def latest(self) -> int | None:
        """Step of the last intact checkpoint, None without any; CheckpointError if all are damaged."""
        steps: list[int] = self.world.broadcast_object(self.steps())
        for step in reversed(steps):
            damage = self.damage(step)
            if damage is None:
                return step
            log.warning("checkpoint %s is damaged (%s); using the one before it", self.path(step), damage)
        if steps:
            raise CheckpointError(
                f"all {len(steps)} checkpoints in {self.folder} are damaged; train again with another --out, or "
                "bring the folder back from a backup."
            )
        return None

    def damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, or None."""
        path = self.path(step)
        manifest: Any = self.world.broadcast_object(_read_manifest(path) if self.world.is_main else None)
        if not isinstance(manifest, dict):
            return str(manifest)
        missing = [name for name in manifest if not (path / name).is_file()]
        if self.world.any(bool(missing)):
            return f"{(missing or ['a file'])[0]} is missing"
        found = self._gather(self._checksums(path, sorted(manifest)))
        wrong = [name for name, checksum in found.items() if checksum != manifest[name]]
        return f"the checksum of {wrong[0]} is wrong" if wrong else None

    def read_state(self, step: int) -> dict[str, Any]:
        """The part that is not tensors."""
        state: dict[str, Any] = json.loads((self.path(step) / STATE).read_text(encoding="utf-8"))
        return state

    def read_into(self, step: int, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        """Fill ``tensors``, named without ``prefix``, in place; CheckpointError if one is missing or of another shape."""
        named = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
        stored = self.metadata(step)
        for name, tensor in named.items():
            shape = tuple(stored[name][0]) if name in stored else None
            if shape != tuple(tensor.shape):
                found = "not at all" if shape is None else f"in shape {shape}"
                needed = f"{tuple(tensor.shape)} is needed"
                raise CheckpointError(f"{self.path(step)} holds {name} {found}; {needed}.")
        if named:
            reader = HuggingFaceStorageReader(str(self.path(step)))
            with _without_warning():
                load(named, storage_reader=reader, no_dist=True)

    def read(self, step: int, prefix: str) -> dict[str, Tensor]:
        """All tensors under ``prefix``, on the CPU, by the rest of their names."""
        kinds = self.metadata(step, prefix)
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}
        self.read_into(step, tensors, prefix)
        return tensors

    def metadata(self, step: int, prefix: str = "") -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of the tensors under ``prefix``, by the rest of their names."""
        metadata = HuggingFaceStorageReader(str(self.path(step))).read_metadata()
        items: dict[str, Any] = metadata.state_dict_metadata
        return {
            name.removeprefix(prefix): (item.size, item.properties.dtype)
            for name, item in items.items()
            if name.startswith(prefix)
        }


@contextmanager
def _without_warning() -> Iterator[None]:
    """torch warns if there is no process group; one process needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _read_manifest(path: Path) -> dict[str, str] | str:
    try:
        files: dict[str, str] = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {type(error).__name__}"
    return files


def _sync_folder(path: Path) -> None:
    """Make the names in a folder durable, not only the files' contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
