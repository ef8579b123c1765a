"""timm is not needed: a module of its name stands for it."""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from hpc_oialr.errors import ConfigError, MissingExtraError
from hpc_oialr.models import ResNetRS

IMAGES = {"pixel_values": torch.randn(2, 3, 32, 32)}
TINY = {"depths": (1, 1, 1, 1), "classes": 5}


@pytest.fixture
def no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)


def test_the_other_network_is_trained_only_if_it_is_asked_for(no_timm):
    for library in ("auto", "timm"):
        with pytest.raises(MissingExtraError) as caught:
            ResNetRS(**TINY, library=library).build(IMAGES)
        message = str(caught.value)
        assert "transformers' ResNet, another network: --model.library transformers" in message
        assert "needs timm (ModuleNotFoundError: " in message
        assert message.endswith("Install it with: pip install 'hpc_oialr[timm]'")
    model = ResNetRS(**TINY, library="transformers").build(IMAGES)
    assert type(model).__name__ == "ResNetForImageClassification"
    with torch.no_grad():
        assert model(pixel_values=IMAGES["pixel_values"]).logits.shape == (2, 5)
        assert model(pixel_values=torch.randn(2, 3, 48, 48)).logits.shape == (2, 5)


def test_resnet_101_has_its_blocks(no_timm):
    with torch.device("meta"):
        model = ResNetRS(library="transformers").build({"pixel_values": torch.empty(2, 3, 160, 160)})
    assert [len(stage.layers) for stage in model.resnet.encoder.stages] == [3, 4, 23, 3]
    assert sum(p.numel() for p in model.parameters()) == 44_549_160


def test_any_fault_of_timm_counts_as_missing(monkeypatch):
    class Broken(importlib.machinery.SourceFileLoader):
        def exec_module(self, module):
            raise RuntimeError("operator torchvision::nms\ndoes not exist")

    class Finder:
        def find_spec(self, name, path=None, target=None):
            return importlib.machinery.ModuleSpec(name, Broken(name, "")) if name == "timm" else None

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    with pytest.raises(MissingExtraError, match=r"\(RuntimeError: operator torchvision::nms does not exist\)"):
        ResNetRS(**TINY).build(IMAGES)


def test_timm_is_asked_for_resnetrs101_and_keeps_its_own_initial_weights(monkeypatch):
    import transformers

    class Wrapper(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.config, self.timm_model = config, Net()

    class Net(nn.Module):
        drawn = None

        def init_weights(self, zero_init_last):
            self.drawn = zero_init_last

    monkeypatch.setitem(sys.modules, "timm", ModuleType("timm"))
    # Not setattr, which would first import the real ones, and with them what is left of timm.
    monkeypatch.setitem(vars(transformers), "TimmWrapperConfig", dict)
    monkeypatch.setitem(vars(transformers), "TimmWrapperForImageClassification", Wrapper)
    model = ResNetRS(classes=7).build(IMAGES)
    assert model.config == {
        "architecture": "resnetrs101",
        "num_labels": 7,
        "model_args": {"layers": [3, 4, 23, 3], "drop_rate": 0.25, "in_chans": 3},
    }
    assert model.timm_model.drawn is True


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"depths is \(1, 2\); must be four numbers of at least 1"):
        ResNetRS(depths=(1, 2))
    with pytest.raises(ConfigError, match=r"dropout is 1; must lie in \[0, 1\)"):
        ResNetRS(dropout=1)
