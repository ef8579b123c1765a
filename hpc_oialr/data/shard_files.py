"""Files written by any number of processes, each file whole or absent, so that a killed call goes on where it was.

Who writes which file is a function of rank and number of ranks alone; processes do not talk to each other. Beside its
files a folder holds ``.plan.json``, what is written there, ``.done/``, a note for each file that is finished, and at the
end ``index.json``, which is written by whoever finds all files there.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hpc_oialr.distributed.environment import launch_info
from hpc_oialr.errors import DataError, SampleError
from hpc_oialr.outputs import OutputError, new_file, resolved, sha256_of

INDEX, PLAN, DONE = "index.json", ".plan.json", ".done"
PARTS = ("train", "val", "test")
OPEN_FILES = 128  # of one process at a time


class FileWriter(Protocol):
    """Makes the files of a folder, each from nothing but its number; sent to processes by pickle."""

    @property
    def names(self) -> Sequence[str]:
        """Of all files."""

    def write(self, number: int, path: Path) -> dict[str, Any]:
        """Write file ``number`` to ``path``, the same bytes in every call; returns what the index says of it."""

    def index(self, folder: Path, files: list[dict[str, Any]]) -> dict[str, Any]:
        """What ``index.json`` says beside its ``files``; lists files written here into ``folder`` as ``tables``."""


def write_files(folder: Path, writer: FileWriter, plan: Mapping[str, Any], *, processes: int = 1) -> bool:
    """Write this rank's share of the files that are not there yet; whether all files of all ranks are.

    Ranks are those of srun, mpirun, torchrun or submitit; each uses so many ``processes``. ``plan`` describes input
    and options. OutputError if the folder holds anything of another plan.
    """
    folder = resolved(folder)
    begin(folder, plan)
    if (folder / INDEX).exists():
        return True
    info = launch_info()
    mine = [n for n in range(info.rank, len(writer.names), info.size) if _note(folder, writer.names[n]) is None]
    if processes > 1 and len(mine) > 1:
        # Not forked: the parent may have threads.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(mine)), context, _set_task, (folder, writer)) as pool:
            list(pool.map(_write_of_task, mine))
    else:
        for number in mine:
            _write_one(folder, writer, number)
    notes = [_note(folder, name) for name in writer.names]
    files = [note for note in notes if note is not None]
    if len(files) < len(notes):
        return False
    content = writer.index(folder, files)
    with new_file(folder / INDEX) as draft:
        draft.write_text(json.dumps({**plan, **content, "files": files}, indent=1) + "\n", encoding="utf-8")
    return True


def begin(folder: Path, plan: Mapping[str, Any]) -> None:
    """Make the folder and note its plan in it, or more of its plan; OutputError if it holds anything of another one."""
    path = folder / PLAN
    # Hidden names may be another rank's, which begins at the same time.
    if folder.exists() and not (folder.is_dir() and (path.exists() or all(e.name[0] == "." for e in folder.iterdir()))):
        raise OutputError(f"{folder} holds other files. Name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).mkdir(exist_ok=True)
    wanted = json.loads(json.dumps(plan))
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, value in found.items():
        if name in wanted and value != wanted[name]:
            raise OutputError(
                f"{folder} was begun with {name} = {_short(value)}, and this is {_short(wanted[name])}. "
                "Give the same input and options to go on with it, or name a new folder."
            )
    if wanted.keys() - found.keys():
        with new_file(path) as draft:
            draft.write_text(json.dumps(found | wanted, indent=1) + "\n", encoding="utf-8")


def read_index(folder: Path, command: str | None = None) -> dict[str, Any]:
    """``index.json`` of a folder that ``command``, or any, has finished; DataError otherwise."""
    wanted = command or "oialr data pack or tokenize"
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except FileNotFoundError:
        begun = (folder / PLAN).exists()
        state = "is not finished: run the same command again" if begun else f"was not written by {wanted}"
        raise DataError(f"{folder} {state}; it has no {INDEX}.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / INDEX} cannot be read: {error}. Make the folder anew by {wanted}.") from error
    if command is not None and index.get("command") != command:
        raise DataError(f"{folder} was written by {index.get('command')}, not by {command}.")
    return index


def verify_files(folder: Path, index: Mapping[str, Any], *, processes: int = 1, discard: bool = False) -> int:
    """Compare every file with its checksum; returns their bytes. DataError names each that is damaged or missing.

    ``discard`` removes these, so that the command that wrote them writes them anew when it is called again.
    """

    def fault(note: Mapping[str, Any]) -> str | None:
        path = folder / note["name"]
        if not path.is_file():
            return f"{path} is missing"
        if (size := path.stat().st_size) != note["bytes"]:
            return f"{path} is damaged: {size} bytes, not {note['bytes']}"
        if (found := sha256_of(path)) != note["sha256"]:
            return f"{path} is damaged: sha256 {found}, not {note['sha256']}"
        return None

    notes = [*index["files"], *index.get("tables", {}).values()]
    with ThreadPoolExecutor(processes) as pool:
        found = dict(zip((note["name"] for note in notes), pool.map(fault, notes), strict=True))
    faults = {name: text for name, text in found.items() if text}
    if not faults:
        return sum(note["bytes"] for note in notes)
    fix = f"Remove damaged files by oialr data verify {folder} --discard; {index['command']} then writes them anew."
    if discard:
        (folder / INDEX).unlink()
        for name in faults:
            (folder / DONE / f"{name}.json").unlink(missing_ok=True)
            (folder / name).unlink(missing_ok=True)
        fix = f"Removed: call {index['command']} again with the same input and options to write them anew."
    raise DataError(f"{'; '.join(faults.values())}. {fix}")


@dataclass
class OpenFiles:
    """Reads bytes of files, of which it keeps some open; forked and unpickled copies work too."""

    paths: Sequence[Path]
    _open: OrderedDict[int, int] = field(default_factory=OrderedDict, repr=False)

    def read(self, file: int, offset: int, size: int) -> bytes:
        """``size`` bytes of file number ``file``; SampleError if they are not there."""
        try:
            descriptor = self._open.get(file)
            if descriptor is None:
                descriptor = os.open(self.paths[file], os.O_RDONLY | os.O_CLOEXEC)
                self._open[file] = descriptor
                if len(self._open) > OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
            # Needs no position, which forked processes would share.
            content = os.pread(descriptor, size, offset)
        except OSError as error:
            raise SampleError(f"{self.paths[file]} cannot be read: {error.strerror}.") from error
        if len(content) != size:
            end = os.fstat(descriptor).st_size
            raise SampleError(f"{self.paths[file]} is damaged: it ends at byte {end}, within an image.")
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {"paths": self.paths, "_open": OrderedDict()}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


def describe_file(path: Path) -> dict[str, Any]:
    """Name, bytes and checksum of a file, as the index has them."""
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def digest(parts: Iterable[bytes]) -> str:
    """sha256 of all parts, each with its length."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def _note(folder: Path, name: str) -> dict[str, Any] | None:
    """What was noted of a finished file; None if it is not finished."""
    try:
        note: dict[str, Any] = json.loads((folder / DONE / f"{name}.json").read_text(encoding="utf-8"))
        return note if (folder / name).stat().st_size == note["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


def _write_one(folder: Path, writer: FileWriter, number: int) -> None:
    name = writer.names[number]
    # One name for all tries: what a killed process left is overwritten.
    draft = folder / f".partial-{name}"
    facts = writer.write(number, draft)
    with draft.open("rb") as written:
        os.fsync(written.fileno())
    note = {**describe_file(draft), "name": name, **facts}
    draft.replace(folder / name)
    with new_file(folder / DONE / f"{name}.json") as noted:
        noted.write_text(json.dumps(note) + "\n", encoding="utf-8")


_task: tuple[Path, FileWriter] | None = None  # of a process of the pool


def _set_task(folder: Path, writer: FileWriter) -> None:
    global _task
    _task = folder, writer


def _write_of_task(number: int) -> None:
    assert _task is not None
    _write_one(*_task, number)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
