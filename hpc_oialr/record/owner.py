"""Who works in a run folder: one process at a time, on whatever host.

``owner.json`` is there while somebody does. Its time of modification is the owner's last sign of life, set by the file
server's clock; so is the time it is compared with, so that clocks of hosts do not matter.
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
from hpc_oialr.distributed.slurm import slurm_job
from hpc_oialr.errors import OIALRError
from hpc_oialr.record.run_folder import RunFolder

log = logging.getLogger(__name__)

# Between two signs of life; silence after which an owner that nobody can ask about counts as dead; and after which one
# does whose job Slurm says is over (it may be another cluster's job of the same number) (s).
BEAT_S, SILENT_S, SILENT_JOB_S = 20.0, 300.0, 50.0
# The command that submits a run holds its folder until the job does (s).
_HANDOVER_S = 60.0
# A process that died while it removed a dead owner's file.
_REMOVAL_S = 30.0
_SUBMIT = "oialr submit"


class FolderInUseError(OIALRError):
    """Another process works in the run folder."""


def process_space() -> str:
    """What processes must share to see each other under the same numbers: the running kernel and its namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return node_name()


def started(pid: int) -> str:
    """When a process of this space was started, exactly enough to tell it from a later one of its number.

    "" if there is no such process, or only the entry of a dead one.
    """
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
    """Who holds a folder."""

    command: str  # e.g. "oialr train"
    host: str = field(default_factory=node_name)
    pid: int = field(default_factory=os.getpid)  # 0 for a job that was submitted and has not begun
    # What makes the process number unique.
    space: str = field(default_factory=process_space)
    started: str = field(default_factory=lambda: started(os.getpid()))
    # The Slurm job, and how often it had been requeued.
    job: str = ""
    restarts: int = 0
    since: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    token: str = field(default_factory=lambda: uuid.uuid4().hex)  # of this claim alone

    def __str__(self) -> str:
        who = f"process {self.pid} on {self.host}" if self.pid else f"a job submitted on {self.host}"
        return f"{who}{f', job {self.job}' if self.job else ''} ({self.command}, since {self.since})"


@dataclass(frozen=True)
class Claim:
    """How a run folder is claimed."""

    command: str = "python"  # what claims it
    # Whether a Slurm job is over; None if nobody can say.
    job_over: Callable[[str], bool | None] = lambda _: None
    # To do before the run begins, if nobody else holds the folder.
    first: Callable[[], object] = lambda: None

    def check(self, folder: RunFolder) -> None:
        """Raise :class:`FolderInUseError` if another process holds the folder; else do what is to be done first."""
        if folder.owner.exists():
            # The only way to know how late it is for the file server.
            self.take(folder).close()
        self.first()

    def take(self, folder: RunFolder) -> Ownership:
        """Make this process the owner.

        Raises FolderInUseError, which names the owner, if another one is, and lives as far as can be known; OIALRError
        if the folder cannot be written.
        """
        job = slurm_job()
        of_job = ("", 0) if job is None else (job.id, job.restarts)
        mine = Owner(command=self.command, job=of_job[0], restarts=of_job[1])
        draft = folder.path / f".owner.{mine.token}"
        try:
            folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(draft, mine)
            self._replace_dead(folder, mine, draft)
        except OSError as error:
            raise OIALRError(
                f"{folder.owner} cannot be written ({error}). Name another folder: --out"
            ) from error
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
        """0 if a holder is dead; else seconds after which to look again, -1 if that is of no use."""
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
    """A folder that is held; gives signs of life in a thread of its own until it is closed.

    ``lost`` says why it is held no more; "" as long as it is.
    """

    def __init__(self, folder: RunFolder, owner: Owner) -> None:
        self.folder, self.owner, self.lost = folder, owner, ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._end.wait(BEAT_S):
            # A file server that does not answer for a while is no reason to end a run.
            with contextlib.suppress(OSError):
                if not self.look():
                    os.utime(self.folder.owner)

    def look(self) -> str:
        """Why the folder is held no more, by a look at it; "" if it is, or if the file server does not answer."""
        with contextlib.suppress(OSError):
            found = _read(self.folder.owner)
            if found is None and self.folder.path.is_dir():
                # Somebody has removed the file, but nobody has taken the folder.
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
    """A new file, on the disk; FileExistsError where there is one."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write(path: Path, owner: Owner) -> None:
    _create(path, json.dumps({"version": 1, **asdict(owner)}, indent=1).encode())


def _link(draft: Path, path: Path) -> bool:
    """Give a file its name unless there is one: at once, over NFS too. Whether that was done."""
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
    """The holder and the time of its last sign of life; None for nobody. Damage is a holder that nobody knows."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise OSError("it is there as a link, a folder or a pipe")
        # Opened, not only looked at: then NFS asks its server.
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
    """Take a dead owner's file away, unless another process is at it or has come meanwhile.

    One process at a time may remove: else the second would take away the file of one who came after the first.
    ``now``: time of the file server (s).
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
