"""Each optimizer of the registry trains through conversion and cuts, and a resumed run has the same bits."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from support.small_training import settings, small_model, train
from support.supported import CLOSURE, make_optimizer, missing

from hpc_oialr import OIALR
from hpc_oialr.optim.state_kinds import OPTIMIZERS, kind_of

TRIED = sorted(set(OPTIMIZERS) - {"bitsandbytes.Optimizer1State", "bitsandbytes.Optimizer2State"})


def begin(name: str) -> tuple[OIALR, Any]:
    model = small_model()
    optimizer = make_optimizer(name, model)
    oialr = OIALR(model, optimizer, settings(delay=4, frequency=3))
    return oialr, optimizer


def going_on(oialr: OIALR, optimizer: Any, name: str, steps: int) -> list[float]:
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    return train(oialr, optimizer, steps, use_closure=name in CLOSURE, same=True)


@pytest.mark.parametrize("name", TRIED)
def test_trains_converts_cuts_and_resumes(name: str) -> None:
    reason = missing(name)
    if reason:
        pytest.skip(reason)
    oialr, optimizer = begin(name)
    first = going_on(oialr, optimizer, name, 8)
    assert set(oialr.r.values()) == {6, 8}
    stored = copy.deepcopy((oialr.state_dict(), oialr.module.state_dict(), optimizer.state_dict()))
    undisturbed = going_on(oialr, optimizer, name, 6)
    resumed, other = begin(name)
    resumed.load_state_dict(stored[0])
    resumed.module.load_state_dict(stored[1])
    other.load_state_dict(stored[2])
    assert going_on(resumed, other, name, 6) == undisturbed
    assert all(math.isfinite(loss) for loss in first + undisturbed)
    assert min(undisturbed) < first[0]
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.dim() > 1):
        matrices = [key for key, value in optimizer.state[p].items() if getattr(value, "shape", None) == p.shape]
        assert all(kind_of(optimizer, key) for key in matrices)
