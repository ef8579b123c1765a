from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.tiny_images import RECIPE
from support.tiny_runs import write_recipe

from hpc_oialr.cli.main import main
from hpc_oialr.distributed import World
from hpc_oialr.errors import CheckpointError, OIALRError
from hpc_oialr.lowrank import low_rank_layers, merge
from hpc_oialr.models.autoformer import PublishedAutoformer
from hpc_oialr.serve.export import export
from hpc_oialr.serve.trained import load_model
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import train

PIXELS = torch.randn(3, 1, 8, 8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    recipe = folder / "images.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    return train(load_config(recipe), folder / "run", world=World.single("cpu"))


def test_dense_loads_into_the_stock_class(run):
    from transformers import ViTForImageClassification
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = export(run.folder, "dense")
    assert folder == run.folder / "export" / "dense"
    stock, report = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    stock.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    with torch.no_grad():
        expected = load_model(run.folder)(pixel_values=PIXELS).logits
        found = stock.eval()(pixel_values=PIXELS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_lowrank_holds_the_factors(run):
    folder = export(run.folder, "lowrank")
    tensors = load_file(folder / "model.safetensors")
    described = json.loads((folder / "lowrank.json").read_text())["layers"]
    dense = merge(load_model(run.folder)).state_dict()
    assert {name: layer["r"] for name, layer in described.items()} == run.summary["r"]
    for name, layer in described.items():
        U, S, Vh = (tensors[f"{name}.{part}"] for part in ("U", "S", "Vh"))
        assert S.shape == (layer["r"], layer["r"])
        torch.testing.assert_close((U @ S @ Vh).reshape(layer["shape"]), dense[f"{name}.weight"])


def test_an_earlier_step_and_another_folder(run, tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint of step 7; there are: 12"):
        export(run.folder, "dense", step=7)
    assert export(run.folder, "dense", step=12, out=tmp_path / "x") == tmp_path / "x"


def test_what_else_is_to_be_known_is_written_and_printed(run, tmp_path, monkeypatch, capsys):
    """Such as of an Autoformer, from whose weights transformers' own class makes other forecasts."""
    from transformers import ViTForImageClassification

    note = PublishedAutoformer.export_note
    monkeypatch.setattr(ViTForImageClassification, "export_note", note, raising=False)
    assert main(["export", str(run.folder), "--format", "dense", "--out", str(tmp_path / "x")]) == 0
    assert f"note: {note}" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "x" / "export.json").read_text())["note"] == note


def test_tied_weights(tmp_path):
    from transformers import GPT2LMHeadModel

    recipe = write_recipe(tmp_path, train={"steps": 8})
    run = train(load_config(recipe), tmp_path / "run", world=World.single("cpu"))
    stock = GPT2LMHeadModel.from_pretrained(export(run.folder, "dense")).eval()
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        model = load_model(run.folder)
        assert low_rank_layers(model)
        torch.testing.assert_close(stock(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_nothing_but_an_earlier_export_is_replaced(run, tmp_path):
    def files(folder):
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    home = tmp_path / "home"
    home.mkdir()
    (home / "diary.txt").write_text("mine")
    there = export(run.folder, "dense", out=tmp_path / "model")
    before = {**files(run.folder), **files(home)}
    for out in (home, run.folder, run.folder / "checkpoints", run.folder.parent):
        with pytest.raises(OIALRError, match=r"Name a new folder"):
            export(run.folder, "dense", out=out)
    assert {**files(run.folder), **files(home)} == before
    export(run.folder, "lowrank", out=there)
    assert sorted(path.name for path in there.iterdir()) == [
        "config.json",
        "export.json",
        "lowrank.json",
        "model.safetensors",
        "written_by_oialr.json",
    ]
    export(run.folder, "dense", out=home, force=True)
    assert (home / "diary.txt").read_text() == "mine"
    assert (home / "model.safetensors").exists()
