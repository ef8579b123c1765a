"""Runs that fine-tune a tiny BERT, on one process and two: resume, merge, export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.spawn import spawn
from support.tiny_bert import write_recipe
from support.train_workers import losses, stop_at_step

from hpc_oialr.cli.main import main
from hpc_oialr.distributed import World
from hpc_oialr.errors import ConfigError, ModelError
from hpc_oialr.finetune import adapters, expert_load
from hpc_oialr.serve.export import Options, export
from hpc_oialr.serve.trained import load_model
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train

METHODS = {"SARA": {"class_path": "SARA", "init_args": {"threshold": 0.2}}, "MoSARA": {"class_path": "MoSARA"}}
SHORT = ["--train.steps", "4", "--checkpoint.every", "null"]
# PEFT's own: it calls what transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of each method, with dropout."""
    folder = tmp_path_factory.mktemp("whole")
    summaries = {}
    for name, method in METHODS.items():
        loaded = load_config(write_recipe(folder, method))
        summaries[name] = train(loaded, folder / name, world=World.single("cpu")).summary
    return folder, summaries


@pytest.mark.parametrize("name", METHODS)
def test_resume_is_bitwise(whole, tmp_path, name):
    folder, summaries = whole
    loaded = load_config(write_recipe(folder, METHODS[name]))
    assert train(loaded, tmp_path / "run", world=World.single("cpu"), stop=stop_at_step(3)).summary is None
    resumed = resume(tmp_path / "run", world=World.single("cpu")).summary
    assert resumed["weights_sha256"] == summaries[name]["weights_sha256"]
    assert losses(tmp_path / "run") == losses(folder / name)
    loads = [expert_load(load_model(each)) for each in (tmp_path / "run", folder / name)]
    assert all(torch.equal(loads[0][layer], load) for layer, load in loads[1].items())


def answer(model, tokens):
    with torch.no_grad():
        return model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


def test_sara_as_dense_weights_and_as_an_adapter_of_peft(whole):
    """Read by the libraries that their users have; the adapter with the factors as they were trained."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification as Auto

    run = whole[0] / "SARA"
    tuned, tokens = load_model(run), torch.randint(4, 14, (5, 9))
    dense = Auto.from_pretrained(export(run, "dense"))
    torch.testing.assert_close(answer(dense, tokens), answer(tuned, tokens), rtol=1e-5, atol=1e-6)
    folder = export(run, "lora")
    adapted = peft.PeftModel.from_pretrained(Auto.from_pretrained(whole[0] / "bert", num_labels=2), folder)
    torch.testing.assert_close(answer(adapted, tokens), answer(tuned, tokens), rtol=1e-5, atol=1e-6)
    written = json.loads((folder / "export.json").read_text())
    assert written["r"] == {name: layer.r for name, layer in adapters(tuned).items()}
    assert written["saved_whole"] == ["classifier"]
    changed = max(float((answer(m, tokens) - answer(tuned, tokens)).abs().max()) for m in (adapted.unload(), dense))
    assert changed > 1e-3, "without the adapter the answers are others"


@pytest.mark.long
def test_mosara_is_exported_as_a_program(whole):
    """Marked long since it imports and runs all of torch.export, which tests/serve does with other models."""
    folder = export(whole[0] / "MoSARA", "pt2")
    assert json.loads((folder / "export.json").read_text())["difference"]["relative"] < 1e-5


def test_mosara_is_neither_dense_nor_an_adapter(whole):
    run = whole[0] / "MoSARA"
    with pytest.raises(ModelError, match="cannot be merged"):
        export(run, "dense")
    with pytest.raises(ConfigError, match="base is None"):
        export(run, "lora")
    with pytest.raises(ModelError, match="cannot be merged"):
        export(run, "lora", options=Options(base=whole[0] / "bert"))


def on_two(rank: int, size: int, folder: str) -> list[str]:
    """SARA under DDP and FSDP, in parts too, and Mo-SARA under DDP; in one process group."""
    world, found = World.from_environment(device="cpu", timeout_s=60), []
    for name, engine in (("SARA", "DDP"), ("SARA", "FSDP"), ("MoSARA", "DDP")):
        words = [*SHORT, "--model.method", name, "--engine", engine]
        words += ["--model.method.threshold", "0.2"] if name == "SARA" else []
        loaded, run = load_config(f"{folder}/recipe.yaml", words), Path(folder) / f"{name}-{engine}"
        summary = train(loaded, run, world=world).summary
        assert summary is not None
        found.append(summary["weights_sha256"])
    parts = load_config(f"{folder}/recipe.yaml", [*SHORT, "--engine", "FSDP", "--model.method.threshold", "0.2"])
    train(parts, Path(folder) / "parts", world=world, stop=stop_at_step(2))
    summary = resume(Path(folder) / "parts", world=world).summary
    assert summary is not None
    return [*found, summary["weights_sha256"]]


def test_two_processes(tmp_path):
    """Without dropout: the losses of one process, and those of a resumed run bitwise."""
    recipe = write_recipe(tmp_path, METHODS["SARA"], dropout=0.0)
    one, other = spawn(on_two, 2, str(tmp_path))
    assert one == other
    assert one[1] == one[3], "FSDP, stopped and resumed"
    for name, method in METHODS.items():
        alone = train(load_config(write_recipe(tmp_path, method), SHORT), tmp_path / name, world=World.single("cpu"))
        for run in tmp_path.glob(f"{name}-*"):
            assert losses(run) == pytest.approx(losses(alone.folder), rel=1e-4)
    assert recipe.exists()


def test_command(tmp_path, capsys):
    recipe = write_recipe(tmp_path, METHODS["SARA"])
    words = ["finetune", str(recipe), "--out", str(tmp_path / "run"), "--train.steps", "2", "--method", "MoSARA"]
    assert main([*words, "--model.method.experts", "3"]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "bert.encoder.layer.0.intermediate.dense" in line).split()
    layer = adapters(load_model(tmp_path / "run"))["bert.encoder.layer.0.intermediate.dense"]
    assert row[1:6] == ["32", "x", "16", str(layer.r), str(2 * 3 * layer.r)]
    assert sum(map(float, row[6:])) == pytest.approx(1, abs=0.02)
    assert main([*words[:2], "--engine", "TensorParallel"]) == 2
    assert main(["finetune", "text_gpt"]) == 2
    said = capsys.readouterr().err
    assert "engine is 'TensorParallel'; must be one of DDP, FSDP to fine-tune" in said
    assert "text_gpt has model GPT2, which starts from random weights" in said
