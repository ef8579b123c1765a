"""fp16 with a loss scale that overflows, and a compiled forward pass, through conversion and cuts."""

from __future__ import annotations

import pytest
import torch
from support.gpu_loop import OPTIMIZERS, Network, batch, make, train
from torch import nn

from hpc_oialr.torch_compat import recompile_limit

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("skipped", [1, 2, 4], ids=["dense", "at the conversion", "at a cut"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_that_overflows_is_left_out(optimizer: str, skipped: int, device: torch.device) -> None:
    """Nothing of it reaches parameters or optimizer state; the method changes layers all the same."""
    oialr = make(device, optimizer)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0, growth_interval=100)
    x, y = batch(device)
    kinds = []
    for step in range(1, 8):
        with torch.autocast(device.type, dtype=torch.float16):
            loss = nn.functional.cross_entropy(oialr.model(x), y)
        scaler.scale(loss).backward()
        if step == skipped:
            next(p.grad for p in oialr.module.parameters() if p.grad is not None).fill_(float("inf"))
            before = [p.detach().clone() for p in oialr.module.parameters()]
        scaler.unscale_(oialr.optimizer)
        scaler.step(oialr.optimizer)
        scaler.update()
        oialr.optimizer.zero_grad()
        if step == skipped:
            now = list(oialr.module.parameters())
            assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))
        report = oialr.step()
        kinds.append(report.kind if report else None)
    assert scaler.get_scale() == 512.0
    assert kinds == [None, "conversion", None, "update", None, "update", None]
    state = [v for values in oialr.optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    assert all(torch.isfinite(value).all() for value in state)
    assert all(torch.isfinite(p).all() for p in oialr.module.parameters())
    assert oialr.r == {"layers.0": 16, "layers.1": 32, "layers.2": 16}


def test_compiled_forward_through_conversion_and_cut(device: torch.device) -> None:
    torch._dynamo.reset()
    eager, compiled = (make(device, importance="weights") for _ in range(2))  # as compiled layers are
    assert isinstance(compiled.module, Network)
    # Compiling for a CPU takes a minute, and is tested by tests/method/test_compile.py.
    compiled.module.compile(backend="inductor" if device.type == "cuda" else "aot_eager")
    with recompile_limit(64):
        expected, losses = (train(oialr, 6, dtype=torch.bfloat16) for oialr in (eager, compiled))
    assert losses == pytest.approx(expected, rel=2e-2)
    assert compiled.r == eager.r == {"layers.0": 16, "layers.1": 32, "layers.2": 16}
