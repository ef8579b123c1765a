"""One process at a time works in a run folder, on any host.

``owner.json`` exists while one does. Its modification time is the owner's last sign of life. It is compared with the
time of another new file, so that only the file server's clock matters, not those of hosts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import stat
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpc_oialr.commands import run_command
from hpc_oialr.distributed.environment import node_name
from hpc_oialr.distributed.slurm import SlurmJob, slurm_job
from hpc_oialr.errors import OIALRError
from hpc_oialr.record.run_folder import RunFolder

log = logging.getLogger(__name__)

BEAT_S = 20.0  # between two signs of life
SILENT_S = 300.0  # silence after which an owner counts as dead
# The same, if Slurm says its job is over (it may be another cluster's job of the same number).
SILENT_JOB_S = 50.0
_HANDOVER_S = 60.0  # the command that submits a run holds its folder until the job does
_REMOVAL_S = 30.0  # a process that died while it removed a dead owner's file
_SUBMIT = "oialr submit"


class FolderInUseError(OIALRError):
    """Another process works in the run folder."""


def process_space() -> str:
    """The running kernel and its PID namespace, in which a process number is unique."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return node_name()


def started(pid: int) -> str:
    """When a process of this space was started, which tells it from a later one of its number; "" if it is dead."""
    try:
        # The name, in parentheses, may hold anything.
        fields = Path("/proc", str(pid), "stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
        return run_command(["ps", "-o", "lstart=", "-p", str(pid)], timeout_s=10).stdout.strip()


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process or job that has claimed a folder."""

    command: str  # e.g. "oialr train"
    host: str = field(default_factory=node_name)
    pid: int = field(default_factory=os.getpid)  # 0 for a job that was submitted and has not begun
    space: str = field(default_factory=process_space)  # this and the next make the process number unique
    started: str = field(default_factory=lambda: started(os.getpid()))
    job: str = ""  # the Slurm job
    restarts: int = 0  # how often it had been requeued
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    token: str = field(default_factory=lambda: uuid.uuid4().hex)  # of this claim alone

    def __str__(self) -> str:
        who = f"process {self.pid} on {self.host}" if self.pid else f"a job submitted on {self.host}"
        return f"{who}{f', job {self.job}' if self.job else ''} ({self.command}, since {self.since})"


@dataclass(frozen=True)
class Claim:
    """How a run folder is claimed."""

    command: str = "python"  # what claims it
    job_over: Callable[[str], bool | None] = lambda _: None  # whether a Slurm job is over; None if unknown
    # Called before the run begins, if nobody else holds the folder.
    first: Callable[[], object] = lambda: None

    def check(self, folder: RunFolder) -> None:
        """Raise :class:`FolderInUseError` if another process holds the folder; else call ``first``."""
        if folder.owner.exists():
            # Only writing a file tells the file server's time.
            self.take(folder).close()
        self.first()

    def take(self, folder: RunFolder) -> Ownership:
        """Make this process the owner.

        Raises FolderInUseError, which names the owner, unless that is known to be dead; OIALRError if the folder cannot
        be written.
        """
        job = slurm_job() or SlurmJob("")
        mine = Owner(command=self.command, job=job.id, restarts=job.restarts)
        draft = folder.path / f".owner.{mine.token}"
        try:
            folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(draft, mine)
            self._replace_dead(folder, mine, draft)
        except OSError as error:
            raise OIALRError(f"{folder.owner} cannot be written ({error}). Name another folder: --out") from error
        finally:
            with contextlib.suppress(OSError):
                draft.unlink()
        return Ownership(folder, mine)

    def _replace_dead(self, folder: RunFolder, mine: Owner, draft: Path) -> None:
        end = time.monotonic() + _HANDOVER_S
        while not _link(draft, folder.owner):
            found = _read(folder.owner)
            if found is None:
                continue
            holder, beat = found
            os.utime(draft)
            silent_s = max(0.0, draft.stat().st_mtime - beat)
            wait = self._life(holder, mine, silent_s)
            if not wait:
                _remove(folder.owner, holder, draft.stat().st_mtime)
            elif wait > 0 and time.monotonic() < end:
                time.sleep(min(wait, 5.0))
            else:
                raise FolderInUseError(
                    f"{folder.path} is in use by {holder}; last sign of life {silent_s:.0f} s ago. Wait for its end, "
                    f"or end it; if it is gone for sure: rm {shlex.quote(str(folder.owner))}"
                )

    def _life(self, holder: Owner, mine: Owner, silent_s: float) -> float:
        """0 if a holder is dead; else seconds after which to look again, -1 if waiting is useless."""
        # A job that was requeued, or that was submitted and has begun: Slurm runs it once at a time.
        if holder.job and holder.job == mine.job and (holder.restarts != mine.restarts or not holder.pid):
            return 0.0
        if holder.pid and holder.space == mine.space:
            if started(holder.pid) != holder.started:
                return 0.0
            return 1.0 if holder.command == _SUBMIT and mine.command != _SUBMIT else -1.0
        over = self.job_over(holder.job) if holder.job and holder.job != mine.job else None
        if over is None:
            return 0.0 if silent_s > SILENT_S else -1.0
        return max(0.0, SILENT_JOB_S - silent_s) if over else -1.0


class Ownership:
    """A claimed folder; a thread gives signs of life until it is closed. ``lost``: why it is no longer held, or ""."""

    def __init__(self, folder: RunFolder, owner: Owner) -> None:
        self.folder, self.owner, self.lost = folder, owner, ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            # A file server that is silent for a while must not end a run.
            with contextlib.suppress(OSError):
                if not self.look():
                    os.utime(self.folder.owner)

    def look(self) -> str:
        """Check the folder: why it is no longer held; "" if it is, or if the file server does not answer."""
        with contextlib.suppress(OSError):
            found = _read(self.folder.owner)
            if found is None and self.folder.path.is_dir():
                # The file was removed, but nobody has taken the folder.
                draft = self.folder.path / f".owner.{uuid.uuid4().hex}"
                try:
                    _write(draft, self.owner)
                    _link(draft, self.folder.owner)
                finally:
                    draft.unlink(missing_ok=True)
                found = _read(self.folder.owner)
            if found is None:
                self.lost = f"{self.folder.path} was removed while its run was going on"
            elif found[0].token != self.owner.token:
                self.lost = f"{self.folder.path} was taken by {found[0]}"
        return self.lost

    def hand_over(self, job: str) -> None:
        """Leave the folder to a job that has been submitted."""
        owner = Owner(command=self.owner.command, pid=0, started="", job=job)
        draft = self.folder.path / f".owner.{owner.token}"
        _write(draft, owner)
        self._stop()
        draft.replace(self.folder.owner)

    def close(self) -> None:
        """Release the folder."""
        self._stop()
        with contextlib.suppress(OSError):
            found = _read(self.folder.owner)
            if found is not None and found[0].token == self.owner.token:
                self.folder.owner.unlink()

    def _stop(self) -> None:
        self._end.set()
        self._thread.join(timeout=5)


def _create(path: Path, content: bytes) -> None:
    """Write a new file and sync it; FileExistsError if there is one."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write(path: Path, owner: Owner) -> None:
    _create(path, json.dumps({"version": 1, **asdict(owner)}, indent=1).encode())


def _link(draft: Path, path: Path) -> bool:
    """Give a file its name unless that is taken, atomically, over NFS too; whether that was done."""
    try:
        path.hardlink_to(draft)
        return True
    except OSError as error:
        # The file server's first answer may have been lost.
        if draft.stat().st_nlink == 2:
            return True
        if isinstance(error, FileExistsError):
            return False
    try:
        # A file system without links.
        _create(path, draft.read_bytes())
        return True
    except FileExistsError:
        return False


def _read(path: Path) -> tuple[Owner, float] | None:
    """The holder and the time of its last sign of life; None for nobody. A damaged file gives an unknown holder."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError("it is there as a link, a folder or a pipe")
        # Opened, since only then NFS asks its server.
        with path.open("rb") as file:
            content, beat = file.read(), os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None
    try:
        fields: dict[str, Any] = json.loads(content)
        fields.pop("version")
        if missing := {each.name for each in dataclass_fields(Owner)} - set(fields):
            raise KeyError(*missing)
        return Owner(**fields), beat
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return Owner(command="unknown", host="unknown", pid=-1, space="", since="unknown", token=""), beat


def _remove(path: Path, dead: Owner, now: float) -> None:
    """Remove a dead owner's file, unless another process does or has taken the folder; ``now``: the file server's time.

    One process at a time may remove: a second one would remove the file of the new owner.
    """
    lock = path.with_name(".owner.removal")
    try:
        _create(lock, b"")
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            if now - lock.stat().st_mtime > _REMOVAL_S:
                lock.unlink()
        time.sleep(0.01)
        return
    try:
        found = _read(path)
        if found is not None and found[0].token == dead.token:
            path.unlink()
            log.warning("%s: taken over from %s, which is gone", path.parent, dead)
    finally:
        lock.unlink(missing_ok=True)
