"""timm's training script: the documented patch of it, if the script is there, and the same calls in a plain loop."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.spawn import spawn
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hpc_oialr import FixedFraction, OIALRConfig
from hpc_oialr.errors import CheckpointError, ModelError
from hpc_oialr.integrations.timm import KEY, ScriptOIALR, match_checkpoint
from hpc_oialr.torch_compat import recompile_limit

PAGE = Path(__file__).resolve().parents[2] / "docs/integrations.md"
SCRIPT = os.environ.get("OIALR_TIMM_SCRIPT", "")
STEPS, EPOCHS = 5, 4
# Two layers settle in the second epoch, and are measured from the first on.
SETTINGS = {"delay": 0.1, "frequency": 2, "rule": FixedFraction(0.5), "layer_share_step": 1.0}
STABLE = {"stability_frequency": 2, "stability_threshold": 0.01, "stability_patience": 3}


class Net(nn.Sequential):
    """As timm's models: plain names in a checkpoint, whatever is around it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def script(rank: int, size: int, folder: Path, resume: str, compiled: bool) -> dict[str, Any]:
    """The calls of the script in their order: resume, average, compile, wrap, train, save on rank 0 alone."""
    if size > 1:
        torch.distributed.init_process_group("gloo")
    plain = net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    config, steps = OIALRConfig(**SETTINGS, **STABLE), EPOCHS * STEPS
    match_checkpoint(net, optimizer, config, resume)
    first = 0
    if resume:
        with torch.serialization.safe_globals([argparse.Namespace]):
            stored = torch.load(resume, weights_only=True)
        net.load_state_dict(stored["state_dict"])
        optimizer.load_state_dict(stored["optimizer"])
        first = stored["epoch"] + 1
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    if resume:
        average.load_state_dict(stored["state_dict_ema"])
    model: nn.Module = torch.compile(net, backend="eager") if compiled else net  # type: ignore[assignment]
    model = DistributedDataParallel(model) if size > 1 else model
    oialr = ScriptOIALR(model, optimizer, config, steps=steps, averages=[None, average], resume=resume)
    for epoch in range(first, EPOCHS):
        order = torch.Generator().manual_seed(epoch)
        for _ in range(STEPS):
            x = torch.randn(16, 12, generator=order)[rank::size]
            cross_entropy(model(x), x[:, :4].argmax(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update_parameters(plain)
            oialr.step()
        state = {"epoch": epoch, "args": argparse.Namespace(model="net"), "state_dict": plain.state_dict()}
        if rank == 0:
            folder.mkdir(exist_ok=True)
            state |= {"optimizer": optimizer.state_dict(), "state_dict_ema": average.state_dict()}
            torch.save(state, folder / f"{epoch}.pth.tar")
    return plain.state_dict() | {f"ema.{name}": tensor for name, tensor in average.state_dict().items()}


@pytest.mark.parametrize("size", [1, 2])
def test_the_calls_of_the_script(size: int, tmp_path: Path) -> None:
    with recompile_limit(8):
        whole = spawn(script, size, tmp_path, "", False) if size > 1 else [script(0, 1, tmp_path, "", compiled=True)]
        assert torch._dynamo.config.recompile_limit == (8 if size > 1 else 64)
    saved = [torch.load(tmp_path / f"{epoch}.pth.tar", weights_only=False) for epoch in range(EPOCHS)]
    states = [each["optimizer"][KEY] for each in saved]
    assert states[0]["tensors"], "the bases by which stability is measured are not stored"
    assert [bool(each["state"]["r"]) for each in states] == [False, True, True, True]
    assert set(states[-1]["state"]["r"].values()) == {6, 12}, "not cut"
    for epoch in range(3 - size):  # in the dense phase, and on one process in the low-rank one
        from_here = (tmp_path / "resumed", str(tmp_path / f"{epoch}.pth.tar"), False)
        resumed = spawn(script, size, *from_here) if size > 1 else [script(0, 1, *from_here)]
        for each in (*whole, *resumed):
            assert each.keys() == whole[0].keys()
            assert all(torch.equal(whole[0][name], tensor) for name, tensor in each.items())


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    config = OIALRConfig(**SETTINGS)
    torch.save({"state_dict": net.state_dict(), "optimizer": optimizer.state_dict()}, dense := tmp_path / "dense.tar")
    with pytest.raises(CheckpointError, match=r"dense\.tar holds no state of OIALR.*--initial-checkpoint"):
        match_checkpoint(net, optimizer, config, dense)
    with pytest.raises(CheckpointError, match=r"none\.tar is no file"):
        match_checkpoint(net, optimizer, config, tmp_path / "none.tar")
    average = AveragedModel(net, device="meta")
    with pytest.raises(ModelError, match="average is on meta, the model on cpu.*--model-ema-force-cpu"):
        ScriptOIALR(net, optimizer, config, steps=10, averages=[average])


# timm gives DistributedDataParallel the CPU as a device id, which torch refuses.
LAUNCHER = """
import functools, runpy, sys
from torch.nn.parallel import DistributedDataParallel as DDP
init = DDP.__init__
DDP.__init__ = functools.wraps(init)(lambda self, module, device_ids=None, **options: init(self, module, **options))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
ARGUMENTS = (
    "--model vit_tiny_patch16_224 --img-size 16 --model-kwargs img_size=16 patch_size=8 depth=1 --num-classes 4 --no-aug "
    "--device cpu -j 0 -b 4 --opt adamw --lr 2e-3 --warmup-epochs 0 --epochs 3 --model-ema --model-ema-decay 0.8"
)


@pytest.mark.skipif(not SCRIPT, reason="OIALR_TIMM_SCRIPT names no train.py of timm's repository")
@pytest.mark.parametrize("size", [1, 2])
def test_patched_script(size: int, tmp_path: Path) -> None:
    for package in ("timm", "torchvision", "PIL"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from PIL import Image

    for split, count in (("train", 10), ("validation", 4)):
        for label in range(4):
            (folder := tmp_path / "data" / split / str(label)).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(100 * label + i).integers(60 * label, 60 * label + 60, (16, 16, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    (tmp_path / "train.py").write_bytes(Path(SCRIPT).read_bytes())
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    diff = re.findall(r"```diff\n(.*?)```", PAGE.read_text(), re.DOTALL)[0]
    # No fuzz: each place must be where the page says.
    subprocess.run(["patch", "--fuzz=0", "train.py"], input=diff, text=True, cwd=tmp_path, check=True)

    def run(name: str, *more: str) -> tuple[dict[str, Any], str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        command += ["launcher.py", "train.py", *ARGUMENTS.split(), "--data-dir", "data", "--output", "."]
        done = subprocess.run(
            [*command, "--experiment", name, *more], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / name / "last.pth.tar", weights_only=False), done.stderr

    whole, log = run("whole")
    assert "conversion of 5 layers" in log
    assert f"Test: [   0/{1 if size == 2 else 3}]" in log
    assert all(r == 48 for name, r in whole["optimizer"][KEY]["state"]["r"].items())
    resumed, log = run("resumed", "--resume", "whole/checkpoint-0.pth.tar")
    assert "Train: 0" not in log
    assert resumed["optimizer"][KEY]["state"] == whole["optimizer"][KEY]["state"]
    for key in ("state_dict", "state_dict_ema"):
        assert resumed[key].keys() == whole[key].keys()
        if size > 1:  # one process draws its samples from a state that timm does not store
            assert all(torch.equal(tensor, resumed[key][name]) for name, tensor in whole[key].items())
