from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from support.tiny_runs import write_recipe
from support.train_workers import stop_at_step
from torch import nn

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits
from hpc_oialr.distributed import World
from hpc_oialr.errors import ConfigError
from hpc_oialr.models import GPT2, ResNet
from hpc_oialr.torch_compat import graphs_compiled, recompile_limit
from hpc_oialr.train.compilation import compile_model, repeated_blocks
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train

TOKENS = {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}


def losses_and_graphs(regions: str) -> tuple[list[float], list[int]]:
    """Of eight steps through a conversion and two cuts; graphs compiled so far, after each step."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT2(vocabulary=64, dim=32, depth=4, heads=2, dropout=0.0).build(TOKENS)
    limits = RankLimits(max_drop=0.5, at_conversion=0.5, round_to=8)
    config = OIALRConfig(
        delay=2, frequency=2, rule=FixedFraction(0.25), limits=limits, layer_share_step=1.0, importance="weights"
    )
    oialr = OIALR(model, torch.optim.AdamW(model.parameters(), lr=1e-2), config)
    compile_model(model, regions, backend="eager")
    tokens, losses, graphs, before = torch.randint(0, 64, (4, 16)), [], [], graphs_compiled()
    for _ in range(8):
        logits = oialr.model(input_ids=tokens).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        oialr.optimizer.step()
        oialr.optimizer.zero_grad()
        oialr.step()
        losses.append(loss.item())
        graphs.append(graphs_compiled() - before)
    return losses, graphs


@pytest.mark.filterwarnings("ignore")
def test_blocks_of_equal_shapes_are_compiled_once_for_every_set_of_r() -> None:
    eager, none = losses_and_graphs("off")
    with recompile_limit(64):
        losses, graphs = losses_and_graphs("blocks")
    assert losses == pytest.approx(eager, rel=1e-5)
    assert not any(none)
    # Dense; half of k from the third step on; a quarter from the fifth on.
    assert graphs == [1, 1, 2, 2, 3, 3, 3, 3]


def test_blocks_of_a_model() -> None:
    assert len(repeated_blocks(GPT2(dim=16, depth=3, heads=2).build(TOKENS))) == 3
    resnet = ResNet(stem=8, dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), block="basic").build(
        {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.int64)}
    )
    assert len(repeated_blocks(resnet)) == 4
    with pytest.raises(ConfigError, match='compile is .?blocks.?; needs a model with a ModuleList.*Set it to "model"'):
        compile_model(nn.Sequential(nn.Linear(2, 2)), "blocks")


@pytest.mark.parametrize(("given", "meant"), [(True, "model"), (False, "off"), ("blocks", "blocks"), ("off", "off")])
def test_true_and_false_of_earlier_versions(tmp_path, given, meant):
    loaded = load_config(write_recipe(tmp_path, compile=given))
    assert loaded.config.compile == loaded.tree["compile"] == meant
    assert load_config(write_recipe(tmp_path / "again"), ["--compile", str(given)]).config.compile == meant
    with pytest.raises(ConfigError, match=r"compile is 'all'.*must be 'off' \| 'blocks' \| 'model'"):
        load_config(write_recipe(tmp_path / "wrong", compile="all"))


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Its config.yaml and its checkpoints say ``compile: false``."""
    world, folder = World.single("cpu"), tmp_path / "run"
    train(load_config(write_recipe(tmp_path)), folder, world=world, stop=stop_at_step(7))
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("compile: 'off'", "compile: false"))
    assert "compile: false" in config.read_text()
    path = folder / "checkpoints" / "settings.json"
    settings = json.loads(path.read_text())
    settings["values"]["compile"], settings["sha256"] = False, ""
    path.write_text(json.dumps(settings))
    for state in folder.glob("checkpoints/step_*/state.json"):
        content = json.loads(state.read_text())
        content["settings"] = settings
        state.write_text(json.dumps(content))
        forget_digest(state)
    assert resume(folder, world=world).summary["steps"] == 24


def forget_digest(state: Path) -> None:
    manifest = state.with_name("manifest.json")
    content = json.loads(manifest.read_text())
    content["files"]["state.json"] = hashlib.sha256(state.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))
