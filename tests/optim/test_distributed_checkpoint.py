"""torch.distributed.checkpoint's state dicts of the optimizer: before the conversion, after it, and in between."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.small_training import controlled, train
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from hpc_oialr import low_rank_layers, muon_adamw

MAKE: dict[str, Any] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 1e-2),
    "MuonAdamW": lambda m: muon_adamw(m, lr=0.02),
}


@pytest.mark.parametrize("steps", [2, 5, 8])
@pytest.mark.parametrize("name", MAKE)
def test_goes_on_as_if_never_stored(name: str, steps: int) -> None:
    """``steps`` is before the conversion, after it, and after a cut; the group for cores is empty at first."""
    oialr, optimizer = controlled(MAKE[name])
    train(oialr, optimizer, steps)
    optimizer.zero_grad()
    stored = copy.deepcopy((oialr.state_dict(), *get_state_dict(oialr.module, optimizer)))
    resumed, other = controlled(MAKE[name])
    resumed.load_state_dict(stored[0])
    set_state_dict(resumed.module, other, model_state_dict=stored[1], optim_state_dict=stored[2])
    for group, own in zip(other.param_groups, optimizer.param_groups, strict=True):
        assert group.keys() == own.keys()
        assert {key: group[key] for key in group if key != "params"} == {
            key: own[key] for key in own if key != "params"
        }
    assert train(resumed, other, 6) == train(oialr, optimizer, 6)
    core = low_rank_layers(resumed.module)["0"].S
    assert any(p is core for group in other.param_groups for p in group["params"] if group.get("cores", True))


def test_options_that_a_stored_group_lacks_stay() -> None:
    oialr, optimizer = controlled(MAKE["MuonAdamW"])
    state = optimizer.state_dict()
    state["param_groups"][1] = {"params": []}
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[1]["cores"] is True
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.03)
    train(oialr, optimizer, 4)
    assert len(optimizer.param_groups[1]["params"]) == 2
