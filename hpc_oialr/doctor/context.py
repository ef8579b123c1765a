"""The process that the checks are about, as its launcher and its user describe it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from hpc_oialr.distributed.environment import (
    LaunchInfo,
    gpus_per_node,
    in_step,
    launch_info,
    node_name,
    under_mpi,
)
from hpc_oialr.errors import WorldError, check_interval

_NO_GPU = ("", "-1", "NoDevFiles")


@dataclass(frozen=True, kw_only=True)
class CheckContext:
    """One process.

    Attributes
    ----------
    environ
        Its variables; programs that a check starts get them too.
    folder
        Where the run writes, or will.
    partition, account
        To be used with Slurm; None leaves them to the cluster.
    need_gib
        Space that the run needs in its folder (GiB).
    timeout_s
        After so long a program counts as hung (s); one that loads torch or starts MPI after three times as long.

    Raises
    ------
    ConfigError
        If ``need_gib`` or ``timeout_s`` is not positive.
    """

    environ: Mapping[str, str]
    folder: Path = Path("runs")
    partition: str | None = None
    account: str | None = None
    need_gib: float = 5.0
    timeout_s: float = 10.0

    def __post_init__(self) -> None:
        check_interval("need_gib", self.need_gib, 0, float("inf"))
        check_interval("timeout_s", self.timeout_s, 0, float("inf"))

    @cached_property
    def contradiction(self) -> str:
        """What the launcher's variables get wrong; "" if they fit each other."""
        try:
            launch_info(self.environ)
        except WorldError as error:
            return str(error)
        return ""

    @cached_property
    def place(self) -> LaunchInfo | None:
        """This process among all; None where variables contradict each other."""
        return None if self.contradiction else launch_info(self.environ)

    @property
    def size(self) -> int:
        """Number of processes."""
        return 1 if self.place is None else self.place.size

    @property
    def local_size(self) -> int:
        """Number of processes on this node."""
        return 1 if self.place is None else self.place.local_size

    @property
    def is_main(self) -> bool:
        """Whether this process asks what one alone should ask, e.g. Slurm."""
        return (self.environ.get("SLURM_PROCID", "0") == "0") if self.place is None else self.place.rank == 0

    @property
    def first_of_node(self) -> bool:
        """Whether this process looks at what all processes of its node share."""
        return (
            (self.environ.get("SLURM_LOCALID", "0") == "0")
            if self.place is None
            else self.place.local_rank == 0
        )

    @property
    def node(self) -> str:
        """Name of its node."""
        return node_name(self.environ)

    @property
    def in_step(self) -> bool:
        """Whether srun started it."""
        return in_step(self.environ)

    @property
    def under_mpi(self) -> bool:
        """Whether mpirun, or srun with one of its MPI plugins, started it."""
        return under_mpi(self.environ)

    @property
    def gpus_asked(self) -> bool:
        """Whether the job has GPUs, by its variables."""
        visible = self.environ.get("CUDA_VISIBLE_DEVICES", "")
        return bool(gpus_per_node(self.environ)) or visible not in _NO_GPU
