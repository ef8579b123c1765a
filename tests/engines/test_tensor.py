"""Tensor parallelism trains the same model as one process: same losses, same r, same clipped gradients."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from support.spawn import spawn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hpc_oialr import OIALR, Energy, OIALRConfig, RankLimits, muon_adamw
from hpc_oialr.distributed import World
from hpc_oialr.engines import Engine, SingleEngine, TensorEngine, TensorParallel
from hpc_oialr.errors import ConfigError, ModelError
from hpc_oialr.models import GPT2, ViT

STEPS, BATCH = 11, 8
OPTIMIZERS = ("AdamW", "MuonAdamW")
MODELS = ("mlp", "vit", "gpt2", "torch")
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}


class TorchEncoder(nn.Module):
    """torch's own transformer layer, and a convolution before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, padding=1)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.unflatten(1, (6, -1))).mT
        return self.head(self.encoder(y).mean(1))


def built(name: str) -> tuple[nn.Module, Any]:
    """A model with fresh weights, and the pairs that are known of it."""
    torch.manual_seed(0)
    if name == "vit":
        config = ViT(image_size=8, patch_size=4, channels=1, dim=16, depth=2, heads=2, classes=4)
        return config.build({"pixel_values": torch.zeros(2, 1, 8, 8)}), config.pairs
    if name == "gpt2":
        config = GPT2(dim=16, depth=2, heads=2, vocabulary=32)
        return config.build({"input_ids": torch.zeros(2, 8, dtype=torch.int64)}), config.pairs
    if name == "torch":
        return TorchEncoder(), ()
    layers = [nn.Linear(12, 24), nn.GELU(), nn.Linear(24, 24), nn.GELU(), nn.Linear(24, 21), nn.Linear(21, 4)]
    return nn.Sequential(*layers), ()


def loss_of(model: nn.Module, name: str, x: Tensor, y: Tensor) -> Tensor:
    if name == "gpt2":
        tokens = (x[:, :8].abs() * 20).long() % 32
        # Not the model's own loss, which is computed in float32.
        return nn.functional.cross_entropy(
            model(input_ids=tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
    if name == "vit":
        x = x.repeat(1, 6)[:, :64].view(-1, 1, 8, 8)
        return nn.functional.cross_entropy(model(pixel_values=x).logits, y)
    return nn.functional.cross_entropy(model(x), y)


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    return muon_adamw(model, lr=0.01) if name == "MuonAdamW" else torch.optim.AdamW(model.parameters(), lr=3e-3)


def config() -> OIALRConfig:
    limits = RankLimits(max_drop=0.25, at_conversion=0.75, round_to=1)
    return OIALRConfig(
        delay=4, frequency=3, rule=Energy(0.8), limits=limits, layer_share_step=1.0, importance="weights"
    )


def trained(
    engine: Engine, name: str, optimizer: str, dtype: torch.dtype, *, clip: float | None = 1.0, parts: int = 1
) -> tuple[list[float], dict[str, int]]:
    """Losses of the global batches, and every layer's r at the end."""
    model, engine.pairs = built(name)
    model.to(dtype)
    engine.place(model)
    oialr = OIALR(model, optimizer_of(optimizer, model), config(), engine=engine)
    generator, losses = torch.Generator().manual_seed(1), []
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(STEPS):
        x, y = torch.randn(BATCH, 12, generator=generator), torch.randint(0, 4, (BATCH,), generator=generator)
        mine = [t.chunk(engine.data_parallel.size)[engine.data_parallel.rank] for t in (x.to(dtype), y)]
        total = 0.0
        for part, piece in enumerate(zip(*(t.chunk(parts) for t in mine), strict=True)):
            loss = loss_of(oialr.model, name, *piece) / parts
            if part < parts - 1:
                with oialr.no_sync():
                    engine.backward(loss, scaler)
            else:
                engine.backward(loss, scaler)
            total += float(engine.data_parallel.all_reduce(loss.detach().double())) / engine.data_parallel.size
        engine.update(oialr.optimizer, scaler, [p for p in model.parameters() if p.requires_grad], clip)
        oialr.step()
        losses.append(total)
    return losses, oialr.r


CASES = [(model, optimizer, torch.float64) for optimizer in OPTIMIZERS for model in MODELS]
SINGLE = [("mlp", "AdamW", torch.float32), ("vit", "MuonAdamW", torch.float32)]
# On four processes data parallelism is what is new.
FEWER = [("mlp", "AdamW", torch.float64), ("vit", "MuonAdamW", torch.float64), *SINGLE]


def train_all(rank: int, size: int) -> list[Any]:
    torch.set_num_threads(1)
    engine = TensorEngine(World.from_environment(device="cpu"), size=2)
    results = [trained(engine, *case) for case in (CASES if size == 2 else FEWER)]
    return [*results, trained(engine, *CASES[0], parts=2)]


@pytest.fixture(scope="module")
def alone() -> dict[Any, Any]:
    engine = SingleEngine(World.single("cpu"))
    return {case: trained(engine, *case) for case in [*CASES, *SINGLE]}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_equal_to_one_process(alone: dict[Any, Any], size: int) -> None:
    cases = [*(CASES if size == 2 else FEWER), CASES[0]]
    for together in spawn(train_all, size):
        for case, (losses, r) in zip(cases, together, strict=True):
            expected, r_alone = alone[case]
            assert r == r_alone, case
            assert losses == pytest.approx(expected, rel=TOLERANCES[case[2]]), case


def test_layers_are_cut_in_these_runs(alone: dict[Any, Any]) -> None:
    for case, (_, r) in alone.items():
        model, _ = built(case[0])
        k = {name: min(model.get_submodule(name).weight.flatten(1).shape) for name in r if "in_proj" not in name}
        assert k, case
        assert all(r[name] < 0.75 * k[name] for name in k), (case, r)


def place(rank: int, size: int) -> tuple[dict[str, tuple[int, ...]], list[str], float, float]:
    """What a process stores of ViT, what the log says, and the clipped norm of a split and of a whole model."""
    engine, lines = TensorEngine(World.from_environment(device="cpu"), size=size), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hpc_oialr.engines.tensor")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model, engine.pairs = built("vit")
    twin, _ = built("vit")
    # Each process begins with weights of its own.
    with torch.no_grad():
        model.vit.layernorm.weight.add_(rank)
    tied = nn.Linear(4, 4)
    model.add_module("tied", nn.ModuleList([tied, nn.Linear(4, 4)]))
    model.tied[1].weight = tied.weight
    with pytest.raises(ModelError, match="call engine.place\\(model\\) before the optimizer is made"):
        engine.wrap(model)
    engine.place(model)
    assert engine.wrap(model) is model
    assert torch.equal(model.vit.layernorm.weight, twin.vit.layernorm.weight)
    norms = [clipped_norm(engine, model), clipped_norm(SingleEngine(World.single("cpu")), twin)]
    stored = {name: tuple(engine.layout.local(p).shape) for name, p in model.named_parameters()}
    return stored, lines, *norms


def clipped_norm(engine: Engine, model: nn.Module) -> float:
    x, y = torch.linspace(-3, 3, 24).view(2, 12), torch.tensor([0, 1])
    loss_of(model, "vit", x, y).mul(100).backward()
    parameters = [p for p in model.parameters() if p.grad is not None]
    engine.clip(parameters, 0.5)
    squares = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in parameters]
    return float(torch.stack([g.double().square().sum() for g in squares]).sum().sqrt())


def test_blocks_are_stored_and_the_rest_is_named() -> None:
    for stored, lines, norm, whole in spawn(place, 2):
        layer = "vit.layers.0."
        assert stored[layer + "attention.q_proj.weight"] == (8, 16)
        assert stored[layer + "attention.q_proj.bias"] == (8,)
        assert stored[layer + "attention.o_proj.bias"] == (16,)
        assert stored[layer + "mlp.fc1.weight"] == (32, 16)
        assert stored["vit.embeddings.patch_embeddings.projection.weight"] == (8, 1, 4, 4)
        assert stored["vit.layernorm.weight"] == (16,)
        split = [f"vit.layers.{i}.{name}" for i in (0, 1) for name in ("attention.o_proj", "mlp.fc2")]
        assert lines[0] == f"features stay split before: {', '.join(split)}"
        reason = "its weight is tied to another layer's"
        bare = "vit.embeddings.position_embeddings (a bare parameter, 1 x 5 x 16, 1% of all numbers)"
        assert lines[1] == f"left whole: tied.0 ({reason}); tied.1 ({reason}); {bare}"
        assert norm == pytest.approx(0.5, rel=1e-5)
        assert norm == pytest.approx(whole, rel=1e-6)


def test_settings_say_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="size is 1; must be at least 2. Take DDP for one process to a model."):
        TensorParallel(size=1)
    with pytest.raises(ConfigError, match="size is 2; must divide the 3 ranks."):
        TensorParallel(size=2).build(World(0, 3), "fp32")
    with pytest.raises(ConfigError, match="train.precision is 'fp16'; cannot be used with TensorParallel.* Take bf16."):
        TensorParallel(size=2).build(World(0, 2), "fp16")
    assert isinstance(TensorParallel(size=2).build(World.single("cpu"), "fp32"), SingleEngine)
