"""Training on bf16 casts of fp32 parameters: gradients, what is cast when, every engine, resume."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from support.spawn import spawn
from support.tiny_runs import merged, write_recipe
from support.train_workers import losses, stop_at_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hpc_oialr import Selection
from hpc_oialr.distributed import World
from hpc_oialr.engines import DeepSpeed
from hpc_oialr.errors import ConfigError, ModelError
from hpc_oialr.lowrank import convert, low_rank_layers
from hpc_oialr.lowrank.attention import unpack
from hpc_oialr.lowrank.base import AutocastCopies
from hpc_oialr.models import ResNet
from hpc_oialr.torch_compat import graphs_compiled
from hpc_oialr.train.bf16_params import cast_parameters
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train

BF16 = {"train": {"precision": "bf16-params", "steps": 16}}
ALL = Selection(keep_first=False, keep_last=False, max_aspect=100)


class Net(nn.Module):
    """Every kind of layer once, one weight tied, in fp32."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.attention = unpack(nn.MultiheadAttention(16, 2, batch_first=True))
        self.norm, self.hidden = nn.LayerNorm(16), nn.Linear(16, 16)
        self.convolution = nn.Conv1d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        x = torch.utils.checkpoint.checkpoint(lambda y: self.hidden(y).relu(), x, use_reentrant=False)
        logits: Tensor = self.head(self.convolution(x.mT).mT)
        return logits


def net(*, low_rank: bool) -> Net:
    torch.manual_seed(0)
    model = Net()
    if low_rank:
        convert(model, ALL, fraction=0.5)
        for layer in low_rank_layers(model).values():
            layer.autocast_copies = AutocastCopies()
    return model


TOKENS = torch.arange(24).reshape(3, 8) % 20


@pytest.mark.parametrize("low_rank", [False, True], ids=["dense", "low-rank"])
def test_gradients_are_those_of_a_bf16_model_in_fp32(low_rank: bool) -> None:
    model = net(low_rank=low_rank)
    reference = copy.deepcopy(model).bfloat16()
    reference(TOKENS).float().square().mean().backward()
    before = dict(model.named_parameters())
    with cast_parameters(model, torch.bfloat16):
        assert model.head.weight is model.embedding.weight
        y = model(TOKENS)
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert all(p is before[name] for name, p in model.named_parameters())
    expected = dict(reference.named_parameters())
    for name, p in model.named_parameters():
        theirs = expected[name].grad
        assert (p.grad is None) == (theirs is None) == (not p.requires_grad), name
        if p.grad is not None and theirs is not None:
            assert p.grad.dtype == p.dtype == torch.float32
            assert torch.equal(p.grad, theirs.float()), name


class Casts(TorchDispatchMode):
    """Shapes of what was cast to bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket is torch.ops.aten._to_copy and result.dtype == torch.bfloat16:
            self.shapes.append(tuple(result.shape))
        return result


def test_frozen_factors_are_cast_after_a_change_only() -> None:
    model, counts = net(low_rank=True), []
    layer = model.hidden
    for step in range(4):
        if step == 2:
            layer.set_factors(-layer.U, -layer.S, layer.Vh.clone())
        with Casts() as casts, cast_parameters(model, torch.bfloat16):
            model(TOKENS)
            copies = (layer.U, layer.Vh)
        counts.append(len(casts.shapes))
        assert all(torch.equal(x, p.bfloat16()) for x, p in zip(copies, (layer.U, layer.Vh), strict=True))
    trained = len({id(p) for p in model.parameters() if p.requires_grad})
    assert counts == [trained + 2 * len(low_rank_layers(model)), trained, trained, trained]


def test_parameters_return_after_an_error_and_bases_are_still_watched() -> None:
    model = net(low_rank=True)
    before = list(model.parameters())
    with pytest.raises(RuntimeError, match="stop"), cast_parameters(model, torch.bfloat16):
        raise RuntimeError("stop")
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    with torch.no_grad():
        model.hidden.U.mul_(2)
    with pytest.raises(ModelError, match="not orthonormal any more"), cast_parameters(model, torch.bfloat16):
        pass


def test_batch_norms_keep_fp32() -> None:
    torch.manual_seed(0)
    net = ResNet(image_size=16, stem=8, dims=(8, 16), depths=(1, 1), block="basic", classes=4)
    model = net.build({"pixel_values": torch.zeros(2, 3, 16, 16)})
    with cast_parameters(model, torch.bfloat16):
        logits = model(pixel_values=torch.randn(4, 3, 16, 16).bfloat16()).logits
        logits.float().sum().backward()
    assert logits.dtype == torch.bfloat16
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert all(b.dtype != torch.bfloat16 for b in model.buffers())


# torch hides this warning itself, unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_are_compiled_once() -> None:
    model, before = net(low_rank=True), graphs_compiled()
    model.hidden.compile(backend="eager")
    model.norm.compile(backend="eager")
    counts = []
    for _ in range(3):
        with cast_parameters(model, torch.bfloat16):
            model(TOKENS).float().sum().backward()
        counts.append(graphs_compiled() - before)
    assert counts[0] > 0
    assert len(set(counts)) == 1


def test_a_run_is_close_to_autocast_and_resumes_bitwise(tmp_path: Path) -> None:
    """Accumulated, with recomputed activations, over the conversion and a cut."""
    train_settings = {"accumulation": 2, "activation_checkpointing": True, "gradient_clip": 0.5}
    recipe, world = write_recipe(tmp_path, **merged(BF16, {"train": train_settings})), World.single("cpu")
    whole = train(load_config(recipe), tmp_path / "whole", world=world)
    train(load_config(recipe), tmp_path / "run", world=world, stop=stop_at_step(9))
    resumed = resume(tmp_path / "run", world=world)
    assert resumed.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert min(resumed.summary["r"].values()) < 12
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    autocast = load_config(recipe, ["--train.precision", "bf16"])
    close = train(autocast, tmp_path / "autocast", world=world)
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "autocast"), rel=1e-2)
    assert whole.summary["metric"] == pytest.approx(close.summary["metric"], rel=1e-2)


ENGINES = ("DDP", "FSDP", "TensorParallel")


def with_each(rank: int, size: int, recipe: str, folder: str) -> None:
    for name in ENGINES:
        loaded, run = load_config(recipe, ["--engine", name]), Path(folder) / name
        train(loaded, run / "whole")
        train(loaded, run / "parts", stop=stop_at_step(7))
        resume(run / "parts")


@pytest.mark.long
def test_two_ranks_of_each_engine(tmp_path: Path) -> None:
    # Under tensor parallelism bases are chosen by the weights.
    more = {"model": {"init_args": {"dropout": 0.0}}, "oialr": {"importance": "weights"}}
    more |= {"train": {"steps": 11, "evaluations": 1}, "checkpoint": {"every": None}}
    recipe = write_recipe(tmp_path, **merged(BF16, more))
    spawn(with_each, 2, str(recipe), str(tmp_path))
    train(load_config(recipe), tmp_path / "alone", world=World.single("cpu"))
    for name in ENGINES:
        assert losses(tmp_path / name / "parts") == losses(tmp_path / name / "whole"), name
        assert losses(tmp_path / name / "whole") == pytest.approx(losses(tmp_path / "alone"), rel=1e-2), name


def test_deepspeed_says_what_to_take() -> None:
    with pytest.raises(ConfigError, match="train.precision is 'bf16-params'; .* Take bf16, in which it stores"):
        DeepSpeed().build(World(size=2), "bf16-params")
