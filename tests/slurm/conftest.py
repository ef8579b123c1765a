from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.slurm_cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A real Slurm without accounting."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster() as started:
        yield started
