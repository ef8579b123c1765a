"""A process that is killed or stopped in any collective leaves the others one clear error, in time."""

from __future__ import annotations

import random
import signal
import time
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.collectives import KINDS, ZERO_STEP, over_and_over
from support.crowd import Crowd

from hpc_oialr.distributed import World
from hpc_oialr.distributed.world import configure_nccl_watchdog
from hpc_oialr.errors import WorldError

TIMEOUT_S = 8.0
RULE = (
    "failed; every rank must take part within the timeout (train.timeout_s). Another one has died or hangs: "
    "see its log, then resume from the last checkpoint."
)
# Linear algebra on a group of the caller's own knows of no run and no recipe.
SVD_RULE = (
    "failed; every rank of the group must call the same function within the timeout. "
    "Another one has died or left: see its log."
)
# What holds an update of shards may be struck in its SVD or in what is sent before and after.
RULES = {
    "SVD of row blocks": (SVD_RULE,),
    "sharded update": (RULE, SVD_RULE),
    "split step": (RULE, SVD_RULE),
}


def struck(crowd: Crowd, number: signal.Signals, chance: random.Random) -> None:
    """Once all are under way, send the last process a signal in the middle of something."""
    for rank in range(len(crowd.processes)):
        assert crowd.hear(rank) == "under way"
    time.sleep(chance.random() * 0.05)
    crowd.strike(len(crowd.processes) - 1, number)


def check_survivors(crowd: Crowd, kind: str) -> None:
    """All others end by themselves, with the text."""
    size = len(crowd.processes)
    for rank in range(size - 1):
        code, message = crowd.end(rank, TIMEOUT_S + 28)
        assert code == 1
        assert message.startswith(f"ProcessLostError: rank {rank} of {size}: ")
        assert any(rule in message for rule in RULES.get(kind, (RULE,))), message


@pytest.mark.parametrize("kind", KINDS)
def test_killed(tmp_path: Path, kind: str) -> None:
    """Of three: one of the others may hear of it from the other only."""
    with Crowd(over_and_over, 3, kind, str(tmp_path), TIMEOUT_S) as crowd:
        struck(crowd, signal.SIGKILL, random.Random(kind))
        check_survivors(crowd, kind)


def test_stopped(tmp_path: Path) -> None:
    """One crowd is started after another, and then they wait for their timeouts together."""
    with ExitStack() as stack:
        crowds = {}
        for kind in KINDS:
            crowds[kind] = stack.enter_context(Crowd(over_and_over, 2, kind, str(tmp_path / kind), TIMEOUT_S))
            struck(crowds[kind], signal.SIGSTOP, random.Random(kind))
        for kind, crowd in crowds.items():
            check_survivors(crowd, kind)


@pytest.mark.long
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is missing: pip install 'hpc_oialr[deepspeed]'")
def test_killed_and_stopped_under_deepspeed(tmp_path: Path) -> None:
    """In a step of ZeRO-3 with an update."""
    with ExitStack() as stack:
        strikes = {signal.SIGKILL: "killed", signal.SIGSTOP: "stopped"}
        crowds = {
            number: stack.enter_context(Crowd(over_and_over, 2, ZERO_STEP, str(tmp_path / name), TIMEOUT_S))
            for number, name in strikes.items()
        }
        for number, crowd in crowds.items():
            struck(crowd, number, random.Random(ZERO_STEP))
        for crowd in crowds.values():
            check_survivors(crowd, ZERO_STEP)


def fail(world: World, message: str) -> None:
    with world.reported("the run's communication", only_communication=True):
        raise RuntimeError(message)


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        fail(World(rank=1, size=2), "mat1 and mat2 shapes cannot be multiplied")
    assert not isinstance(caught.value, WorldError)


def test_the_libraries_own_words_stand_at_the_end() -> None:
    with pytest.raises(WorldError, match=r"communication failed; .*\(Connection closed by peer\)$"):
        fail(World(rank=1, size=2), "Connection closed by peer")


def test_an_error_is_told_once() -> None:
    outer = World(rank=1, size=2).reported("a step")
    with pytest.raises(WorldError, match=r"^rank 1 of 2: the run's communication failed"), outer:
        fail(World(rank=1, size=2), "Connection closed by peer")


def test_nccl_leaves_hard_and_keeps_what_the_user_set() -> None:
    environ = {"TORCH_NCCL_ENABLE_MONITORING": "0"}
    configure_nccl_watchdog(environ, timeout_s=90.4)
    assert environ == {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3",
        "TORCH_NCCL_ENABLE_MONITORING": "0",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "90",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
    short: dict[str, str] = {}
    configure_nccl_watchdog(short, timeout_s=2)
    assert short["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "60"
