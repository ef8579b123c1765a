from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hpc_oialr.errors import ModelError
from hpc_oialr.lowrank import Selection, convert, low_rank_layers, merge
from hpc_oialr.lowrank.folded import FoldedWeight, empty_folded, fold, folded_layers

EVERYTHING = Selection(keep_last=False)


class Conv1DModel(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.layer = Conv1D(24, 16)

    def forward(self, x):
        return self.layer(x)


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x)[0]


CASES = {
    "linear": (lambda: nn.Sequential(nn.Linear(16, 24)), (5, 16)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(6, 12, 3, stride=2, padding=1)), (2, 6, 9)),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(6, 12, 3, padding="same", padding_mode="circular")), (2, 6, 7, 8)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(4, 12, 2, dilation=2, bias=False)), (2, 4, 5, 5, 5)),
    "Conv1D": (Conv1DModel, (2, 5, 16)),
    "attention": (Attention, (2, 5, 16)),
    "attention, keys of another width": (lambda: Attention(kdim=16, vdim=16, bias=False), (2, 5, 16)),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2),
        (2, 5, 16),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
def test_outputs_are_those_of_the_merged_model_and_survive_a_file(case):
    build, shape = CASES[case]
    torch.manual_seed(0)
    model = build().double().eval()
    untouched, x = copy.deepcopy(model), torch.randn(*shape, dtype=torch.float64)
    convert(model, EVERYTHING, fraction=0.3)
    folded = fold(model)
    assert len(folded_layers(folded)) == len(low_rank_layers(model)) > 0
    assert not any(p.requires_grad for p in folded.parameters())
    with torch.no_grad():
        expected = merge(model)(x)
        torch.testing.assert_close(folded(x), expected, rtol=1e-12, atol=1e-12)
        for name, layer in folded_layers(folded).items():
            dense = low_rank_layers(model)[name]
            torch.testing.assert_close(layer.weight, dense.merged_weight(), rtol=1e-12, atol=1e-12)
            assert set(dict(layer.named_parameters())) <= {"down", "up", "bias"}
            assert layer.down.numel() + layer.up.numel() == dense.r * (dense.m + dense.n)
        empty_folded(untouched, {name: layer.r for name, layer in folded_layers(folded).items()})
        assert list(untouched.state_dict()) == list(folded.state_dict())
        untouched.load_state_dict(folded.state_dict(), strict=True)
        assert torch.equal(untouched(x), folded(x))


def test_what_two_factors_would_make_larger_is_dense():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    convert(model, EVERYTHING, fraction=0.5)
    folded = fold(model)
    assert [type(layer) for layer in folded] == [nn.Linear, nn.Linear]
    assert not any(isinstance(layer, FoldedWeight) for layer in folded.modules())


def test_factors_of_an_unknown_layer_are_refused():
    with pytest.raises(ModelError, match=r"a layer 'head' of two factors, and Sequential has none"):
        empty_folded(nn.Sequential(nn.Linear(4, 4)), {"head": 2})
