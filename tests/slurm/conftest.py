from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.mpirun import HERE

from benchmarks.fault_injection import TINY
from benchmarks.slurm_cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm without accounting."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster() as started:
        yield started


@pytest.fixture(scope="session")
def whole(cluster: Cluster) -> Callable[[], Path]:
    """An undisturbed run on two nodes: goes on at once, waited for when its folder is asked for."""
    folder = cluster.root / "whole"
    script = str(HERE / "slurm" / "fashion_mnist.sh")
    job = cluster.sbatch("--nodes=2", script, *TINY, OIALR_OUT=str(folder))

    def wait() -> Path:
        job.wait()
        return folder

    return wait
