"""What torch remembers of every shape that a DTensor ever had."""

from __future__ import annotations

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
from torch.distributed.tensor.debug import _clear_sharding_prop_cache


def forget_shapes() -> None:
    """Empty torch's unbounded tables of how operations split their results (as of torch 2.13).

    They gain a hundred objects a layer at each change of r, and none is asked for again. The next step fills them
    anew: some milliseconds.
    """
    _clear_sharding_prop_cache()
    clear_redistribute_planner_cache()
    _gen_transform_infos.cache_clear()
    FakeTensorMode.cache_clear()
