from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from hpc_oialr.errors import DataError
from hpc_oialr.report.analyze import MatrixSelection
from hpc_oialr.report.checkpoint import open_checkpoint

MATRIX = torch.randn(8, 8)
FP8 = MATRIX.to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"a.weight": FP8, "a.weight_scale_inv": torch.ones(1, 1)}, "a.weight as F8_E4M3"),
        ({"a.weight": FP8}, "a.weight as F8_E4M3"),
        ({"a.weight": MATRIX.to(torch.int8), "a.SCB": torch.ones(8)}, "a.weight as I8"),
        ({"a.qweight": MATRIX.int(), "a.scales": torch.ones(1, 8)}, "a.qweight as I32"),
        ({"a.weight_blocks": MATRIX.to(torch.uint8)}, "a.weight_blocks as U8"),
        ({"a.W_q": MATRIX.to(torch.uint8), "a.scale": torch.ones(8)}, "a.W_q as U8"),
        ({"a.gate_up_proj": FP8, "a.gate_up_proj_scale": torch.ones(8)}, "a.gate_up_proj as F8_E4M3"),
    ],
)
def test_quantised_matrices_are_refused_by_name(tmp_path, state, text):
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=f"model.safetensors holds {text}; must be real") as raised:
        open_checkpoint(tmp_path)
    assert "complete" not in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int64])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_numbers_of_another_kind_are_called_what_they_are(tmp_path, dtype, suffix):
    state = {"a.weight": MATRIX.to(dtype)}
    (torch.save if suffix == "pt" else save_file)(state, tmp_path / f"model.{suffix}")
    with pytest.raises(DataError, match="a.weight as .*; must be real floating-point numbers"):
        open_checkpoint(tmp_path / f"model.{suffix}")


def test_two_weights_of_one_layer():
    for names in (("weight", ".weight"), ("module.a.weight", "a.weight")):
        with pytest.raises(DataError, match=r"are both the weight of layer"):
            MatrixSelection(min_dim=1).matrices(dict.fromkeys(names, (8, 8)))


def test_quantised_torch_file(tmp_path):
    torch.save({"a.weight": FP8, "a.weight_scale": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(DataError, match="a.weight as torch.float8_e4m3fn; must be"):
        open_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (MATRIX.to_sparse(), "layout torch.sparse_coo as a.weight"),
        (MATRIX.to("meta"), "no values as a.weight"),
    ],
)
def test_tensors_without_a_matrix_in_them(tmp_path, tensor, text):
    torch.save({"a.weight": tensor, 0: MATRIX}, tmp_path / "model.pt")
    with pytest.raises(DataError, match=text):
        open_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("state", [None, "{", "[]", "{}"])
def test_a_damaged_checkpoint_of_a_run(tmp_path, state):
    folder = tmp_path / "step_00000005"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    if state is not None:
        (folder / "state.json").write_text(state)
    with pytest.raises(DataError, match=r"step_00000005 is damaged \(state\.json: "):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("model.pt", b"version https://git-lfs", "is not a torch file: it begins with b'version https:/"),
        ("model.bin", b"", "is not a torch file: it begins with b''"),
    ],
)
def test_text_is_not_called_code(tmp_path, name, content, text):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=text):
        open_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ("{", "is not valid JSON"),
        ("[]", "is damaged"),
        (json.dumps({"weight_map": ["a"]}), "is damaged"),
        (
            json.dumps({"weight_map": {"a.weight": "../other.safetensors"}}),
            "must be plain names of files beside it",
        ),
        (
            json.dumps({"weight_map": {"a.weight": "gone.safetensors"}}),
            "names gone.safetensors, which is missing",
        ),
    ],
)
def test_bad_shard_indices(tmp_path, index, text):
    save_file({"a.weight": MATRIX}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(DataError, match=text):
        open_checkpoint(tmp_path)
