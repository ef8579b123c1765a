"""The real code as one of 1,024 processes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist

from hpc_oialr.engines import DDP, FSDP, DeepSpeed, TensorParallel
from hpc_oialr.errors import ConfigError
from hpc_oialr.method.rules import FixedFraction
from hpc_oialr.plan.scripted_run import dry_run


@pytest.mark.parametrize(
    "engine",
    [DDP(), pytest.param(FSDP(), marks=pytest.mark.long), FSDP(frozen="replicated"), TensorParallel(size=4)],
    ids=str,
)
def test_some_of_1024_processes(workload, engine):
    ranks = None if isinstance(engine, DDP) else [0, 1023]
    found = list(dry_run(workload, 1024, engine=engine, rule=FixedFraction(0.25), ranks=ranks))
    assert [(run.rank, run.size) for run in found] == [(rank, 1024) for rank in ranks or [0, 512, 1023]]
    assert {run.channel for run in found} == {"fake"}
    # Three quarters at the conversion, a quarter after the first update.
    assert {run.r for run in found} == {(4, 4)}
    assert not dist.is_initialized()
    if isinstance(engine, DDP):
        assert [run.svds for run in found] == [1, 0, 0], "four layers for 1,024 processes"
        assert len({run.resident_bytes for run in found}) == 1
    if isinstance(engine, FSDP):
        assert found[0].resident_bytes > found[-1].resident_bytes, "the last ones have empty shards"


def test_trained_bases_on_1024_processes(workload):
    config = replace(workload.config, oialr=replace(workload.config.oialr, train="factors"))
    (frozen,) = dry_run(workload, 1024, rule=FixedFraction(0.25), ranks=[512])
    (run,) = dry_run(replace(workload, config=config), 1024, rule=FixedFraction(0.25), ranks=[512])
    assert run.r == (4, 4)
    assert run.resident_bytes > frozen.resident_bytes


def test_deepspeed_cannot(workload):
    with pytest.raises(
        ConfigError, match="engine is 'DeepSpeed'; cannot be run without its processes; .*Take DDP, FSDP"
    ):
        list(dry_run(workload, 8, engine=DeepSpeed()))
