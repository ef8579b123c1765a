"""Every form of export, read back by the library that its users have, gives the dense export's outputs."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import yaml
from support.tiny_images import RECIPE, RESNET
from support.tiny_runs import merged, write_recipe

from hpc_oialr import load_factored
from hpc_oialr.cli.main import main
from hpc_oialr.distributed import World
from hpc_oialr.errors import CheckpointError, ConfigError, MissingExtraError, ModelError
from hpc_oialr.lowrank import LowRankWeight, low_rank_layers, merge
from hpc_oialr.lowrank.folded import folded_layers
from hpc_oialr.serve.export import Options, export
from hpc_oialr.serve.trained import load_model, load_trained
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import train

# PEFT's own: it calls what transformers has renamed, and warns of tied weights, of which the adapter has both names.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
]
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def trained(recipe, folder):
    return train(load_config(recipe), folder, world=World.single("cpu"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A language model with tied weights, Conv1D layers and two checkpoints, both at low rank."""
    folder = tmp_path_factory.mktemp("text")
    return trained(write_recipe(folder, train={"steps": 16}, checkpoint={"every": 8}), folder / "run").folder


@pytest.fixture(scope="module")
def stock(compared):
    """The dense export in the stock class of transformers, on random images."""
    from transformers import ViTForImageClassification

    return ViTForImageClassification.from_pretrained(export(compared / "oialr", "dense")).eval()


def answer(model, images):
    with torch.no_grad():
        return model(pixel_values=images).logits


def test_factored_needs_neither_run_nor_recipe(compared, stock, tmp_path):
    folder, images = export(compared / "oialr", "factored", out=tmp_path / "x"), torch.randn(5, 1, 8, 8)
    (compared / "oialr").rename(compared / "away")
    try:
        before = torch.get_rng_state()
        model = load_factored(folder)
        assert torch.equal(torch.get_rng_state(), before)
    finally:
        (compared / "away").rename(compared / "oialr")
    assert folded_layers(model)
    assert not model.training
    assert not any(isinstance(layer, LowRankWeight) for layer in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(answer(model, images), answer(stock, images), **ROUNDING)
    written = json.loads((folder / "export.json").read_text())
    assert written["difference"]["relative"] < 1e-5
    dense = compared / "oialr" / "export" / "dense" / "model.safetensors"
    assert (folder / "factored.safetensors").stat().st_size < dense.stat().st_size


def test_lowrank_goes_on_training(compared, stock, tmp_path):
    model = load_factored(export(compared / "oialr", "lowrank", out=tmp_path / "x"))
    images = torch.randn(2, 1, 8, 8)
    assert low_rank_layers(model)
    torch.testing.assert_close(answer(model, images), answer(stock, images), **ROUNDING)
    model(pixel_values=images, labels=torch.tensor([0, 1])).loss.backward()
    assert all(layer.S.grad is not None for layer in low_rank_layers(model).values())


def test_a_model_of_this_package_is_built_by_its_settings(tmp_path):
    """The ResNet enlarges its images, which no config.json of transformers says."""
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(merged(merged(RECIPE, RESNET), {"model": {"init_args": {"image_size": 16}}}))
    )
    run = trained(tmp_path / "r.yaml", tmp_path / "run").folder
    folder = export(run, "factored")
    assert json.loads((folder / "factored.json").read_text())["library"] == "hpc_oialr"
    images, model = torch.randn(2, 1, 8, 8), load_factored(folder)
    torch.testing.assert_close(answer(model, images), answer(load_model(run), images), **ROUNDING)
    assert folded_layers(model)


@pytest.mark.parametrize(("form", "weights"), [("onnx", "factored"), ("pt2", "factored"), ("pt2", "dense")])
def test_programs_give_the_dense_exports_outputs(compared, stock, tmp_path, form, weights, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    out, images = tmp_path / form, torch.randn(7, 1, 8, 8)
    words = ["export", str(compared / "oialr"), "--format", form, "--weights", weights, "--out", str(out)]
    assert main(words) == 0
    assert "largest difference of outputs from the trained model's" in capsys.readouterr().out
    if form == "onnx":
        session = onnxruntime.InferenceSession(out / "model.onnx")
        found = torch.from_numpy(session.run(None, {"pixel_values": images.numpy()})[0])
    else:
        found = torch.export.load(out / "model.pt2").module()(images)
    torch.testing.assert_close(found, answer(stock, images), **ROUNDING)


def test_text_of_any_length_through_onnx(text):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder = export(text, "onnx", options=Options(weights="dense"))
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    tokens = torch.randint(0, 256, (3, 11))
    (found,) = session.run(None, {"input_ids": tokens.numpy()})
    with torch.no_grad():
        expected = load_model(text)(tokens).logits
    torch.testing.assert_close(torch.from_numpy(found), expected, **ROUNDING)


def test_lora_of_what_followed_the_conversion_is_exact(text, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    from transformers import GPT2LMHeadModel

    base, folder = export(text, "dense", step=8, out=tmp_path / "base"), tmp_path / "adapter"
    assert main(["export", str(text), "--format", "lora", "--base", str(base), "--out", str(folder)]) == 0
    assert "largest difference" in capsys.readouterr().out
    ranks = {name: layer.r for name, layer in low_rank_layers(load_trained(text, step=8).model).items()}
    found = json.loads((folder / "export.json").read_text())
    assert found["r"]
    assert all(r <= ranks[name] for name, r in found["r"].items())  # S - S0 within bases that stayed
    assert set(ranks) - set(found["r"]) <= set(found["saved_whole"])  # two factors would be larger
    tokens = torch.randint(0, 256, (2, 9))
    adapted = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), folder).eval()
    with torch.no_grad():
        expected = merge(load_model(text))(tokens).logits
        torch.testing.assert_close(adapted(input_ids=tokens).logits, expected, **ROUNDING)


def test_lora_that_is_cut_says_how_much(compared, tmp_path):
    pytest.importorskip("peft")
    base = export(compared / "dense", "dense", out=tmp_path / "base")
    folder = export(compared / "oialr", "lora", out=tmp_path / "cut", options=Options(base=base, r=2))
    found = json.loads((folder / "export.json").read_text())
    assert set(found["r"].values()) == {2}
    assert 0.01 < found["truncation_error"] < 1
    exact = export(compared / "oialr", "lora", out=tmp_path / "whole", options=Options(base=base, r=64))
    assert json.loads((exact / "export.json").read_text())["difference"]["relative"] < 1e-4


def test_hub_folder_has_a_card_that_the_run_filled_in(compared, stock):
    from huggingface_hub import ModelCard

    folder = export(compared / "oialr", "hub")
    card, summary = ModelCard.load(folder / "README.md"), json.loads((compared / "oialr/summary.json").read_text())
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", summary["metric"])
    assert card.data.pipeline_tag == "image-classification"
    assert f"{summary['trainable_params']:,}" in card.text
    for name, r in summary["r"].items():
        assert f"| `{name}` | " in card.text
        assert f" | {r} | " in card.text
    assert f"| torch | {torch.__version__} |" in card.text
    images = torch.randn(2, 1, 8, 8)
    for model in (type(stock).from_pretrained(folder).eval(), load_factored(folder)):
        torch.testing.assert_close(answer(model, images), answer(stock, images), **ROUNDING)


def test_refusals(compared, text, tmp_path, monkeypatch):
    run = compared / "oialr"
    with pytest.raises(CheckpointError, match=r"holds no factored.safetensors; write it with oialr export RUN"):
        load_factored(tmp_path)
    with pytest.raises(ConfigError, match="base is None; must name the model"):
        export(run, "lora", out=tmp_path / "x")
    with pytest.raises(ModelError, match="is no base model"):
        export(run, "lora", out=tmp_path / "x", options=Options(base=tmp_path))
    base = export(text, "dense", out=tmp_path / "base")
    with pytest.raises(ModelError, match="an adapter needs two models of one architecture"):
        export(run, "lora", out=tmp_path / "x", options=Options(base=base))
    folder = export(run, "factored", out=tmp_path / "f")
    plan = json.loads((folder / "factored.json").read_text())
    (folder / "factored.json").write_text(json.dumps({**plan, "library": None}))
    with pytest.raises(ModelError, match=r"give a dense one: load_factored\(folder, model\)"):
        load_factored(folder)
    assert folded_layers(load_factored(folder, merge(load_model(run))))
    with pytest.raises(ModelError, match="has a layer"):
        load_factored(folder, merge(load_model(text)))
    for name in ("onnxruntime", "peft"):
        monkeypatch.setitem(sys.modules, name, None)
    for form, extra in (("onnx", "onnx"), ("lora", "peft")):
        with pytest.raises(MissingExtraError, match=rf"pip install 'hpc_oialr\[{extra}\]'"):
            export(run, form, out=tmp_path / "x", options=Options(base=export(run, "dense", out=tmp_path / "d")))
    assert not (tmp_path / "x").exists()


def test_other_outputs_are_refused(compared, tmp_path, monkeypatch):
    from hpc_oialr.lowrank import folded

    fold_layer = folded._fold_layer

    def wrong(layer):
        fold_layer(layer)
        layer.up.data *= 1.01

    monkeypatch.setattr(folded, "_fold_layer", wrong)
    with pytest.raises(
        ModelError, match=r"the factored export gives other outputs than the trained model: .*Nothing was"
    ):
        export(compared / "oialr", "factored", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
