from __future__ import annotations

import torch
from torch import nn

from hpc_oialr.distributed import World
from hpc_oialr.train.run_context import synchronise_batch_norm


def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(5)))


def kinds(module: nn.Module) -> list[type]:
    return [type(child) for child in module.modules() if isinstance(child, nn.modules.batchnorm._BatchNorm)]


def test_on_gpus_every_layer_is_synchronised():
    module = model()
    before = dict(module.named_parameters())
    synchronise_batch_norm(module, World(0, 4, device=torch.device("cuda", 0)))
    assert kinds(module) == [nn.SyncBatchNorm] * 2
    assert all(p is before[name] for name, p in module.named_parameters())


def test_elsewhere_layers_stay_and_a_warning_says_so(caplog):
    module = model()
    synchronise_batch_norm(module, World(0, 4, device=torch.device("cpu")))
    assert kinds(module) == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert "torch can do that on GPUs only: each of the 4 ranks takes" in caplog.text


def test_one_process_has_nothing_to_synchronise(caplog):
    module = model()
    synchronise_batch_norm(module, World.single("cpu"))
    assert kinds(module) == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert caplog.text == ""
