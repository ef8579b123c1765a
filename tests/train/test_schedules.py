from __future__ import annotations

import math

import pytest
import torch

from hpc_oialr.errors import ConfigError
from hpc_oialr.train.schedules import Constant, StepDecay, WarmupCosine


def test_warmup_then_cosine():
    schedule = WarmupCosine(warmup=0.1, final=0.2)
    factors = [schedule.factor(step, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[55] == pytest.approx(0.6)
    assert factors[100] == pytest.approx(0.2)


def test_k_decay_falls_sooner():
    assert WarmupCosine(warmup=0, k_decay=0.34).factor(50, 100) == pytest.approx(
        0.5 * (1 + math.cos(math.pi * 0.5**0.34))
    )


def test_groups_keep_their_proportions():
    a, b = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}])
    rates = WarmupCosine(warmup_steps=2).build(optimizer, 10)
    rates.set(0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.05]
    restored = Constant().build(optimizer, 10)
    restored.load_state_dict(rates.state_dict())
    restored.set(5)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1]


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"warmup is 1; must lie in \[0, 1\)"):
        WarmupCosine(warmup=1)
    with pytest.raises(ConfigError, match="warmup_steps is -1; must not be negative"):
        WarmupCosine(warmup_steps=-1)


def test_warmup_in_epochs():
    schedule = WarmupCosine(warmup_epochs=2)
    assert [schedule.factor(step, 100, 5) for step in (0, 9, 10)] == pytest.approx([0.1, 1.0, 1.0])
    rates = schedule.build(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0), 100, 5)
    rates.set(4)
    assert rates.current == pytest.approx(0.5)
    with pytest.raises(ConfigError, match="warmup_steps is 3; cannot be given beside warmup_epochs"):
        WarmupCosine(warmup_steps=3, warmup_epochs=1)
    with pytest.raises(ConfigError, match="warmup_epochs is -1; must not be negative"):
        WarmupCosine(warmup_epochs=-1)


def test_step_decay():
    schedule = StepDecay(decay=0.5, epochs=2)
    assert [schedule.factor(step, 100, 5) for step in (0, 9, 10, 20)] == [1.0, 1.0, 0.5, 0.25]
    with pytest.raises(ConfigError, match=r"decay is 0; must lie in \(0, 1\]"):
        StepDecay(decay=0)
