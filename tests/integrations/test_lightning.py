"""Lightning, the real library: resumed runs are what they should be, evaluations take any r, the rest is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.spawn import spawn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from hpc_oialr import FixedFraction, OIALRConfig, RankLimits, merge
from hpc_oialr.errors import CheckpointError, ModelError

lightning = pytest.importorskip("lightning.pytorch")
from hpc_oialr.integrations.lightning import OIALRCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
EPOCHS = 4
# On two processes: conversion after step 5 of 16, updates after 8, 11 and 14, a checkpoint every 4.
CONFIG = OIALRConfig(
    delay=5 / 16,
    frequency=3 / 16,
    rule=FixedFraction(0.25),
    limits=RankLimits(at_conversion=0.75, round_to=1),
    layer_share_step=1.0,
    moments_steps=3,
)
X = torch.randn(128, 12, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(X, X[:, :4].argmax(1))


class Net(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Its ``training_step`` does not call the module itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("right", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), sync_dist=True)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


def fit(folder: Path, resume: Path | None = None, **options: Any) -> tuple[Any, Net, OIALRCallback]:
    callback, model = OIALRCallback(CONFIG), Net()
    saver = lightning.callbacks.ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        callbacks=[saver, callback, *options.pop("more", [])],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, **options},
    )
    trainer.fit(model, DataLoader(DATA, batch_size=8), DataLoader(DATA, batch_size=32), ckpt_path=resume)
    return trainer, model, callback


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, others = merge(a).state_dict(), merge(b).state_dict()
    return all(torch.equal(ours[name], others[name]) for name in ours)


def resumed(folder: Path, epochs: tuple[int, ...], **options: Any) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Whether a run that goes on from a checkpoint is the uninterrupted one; its dense weights and r."""
    trainer, whole, callback = fit(folder, **options)
    assert callback.oialr is not None
    assert callback.oialr.t == trainer.global_step
    r = callback.oialr.r
    assert sorted(r) == ["net.0", "net.2"]
    assert r == {"net.0": 3, "net.2": 6}
    for epoch in epochs:
        _, again, second = fit(folder / "again", folder / f"epoch={epoch}.ckpt", **options)
        assert second.oialr is not None
        assert second.oialr.r == r
        assert same(whole, again), f"resumed after epoch {epoch}"
    stored = torch.load(folder / "epoch=0.ckpt", weights_only=True)["oialr"]["tensors"]
    assert {name.rpartition(".")[2] for name in stored} == {str(rank) for rank in range(options.get("devices", 1))}
    assert all(bool(sums.any()) for sums in stored.values()), "nothing was gathered"
    # Other r and the dense phase, in the same process and in a module that was never trained.
    for epoch in (0, 3):
        stored = folder / f"epoch={epoch}.ckpt"
        results = [
            lightning.Trainer(
                accelerator="cpu", devices=1, logger=False, callbacks=[OIALRCallback(CONFIG)], enable_progress_bar=False
            ).test(model, DataLoader(DATA, batch_size=32), ckpt_path=stored, verbose=False)
            for model in ((Net(),) if options else (Net(), whole))
        ]
        assert all(result == results[0] for result in results)
        assert results[0][0]["right"] > 0.2
    return merge(whole).state_dict(), r


def test_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    resumed(tmp_path, (0, 1, 2))


def several(rank: int, size: int, folder: Path) -> Any:
    warnings.simplefilter("default")
    return resumed(folder, (0, 2), devices=size, strategy="ddp")


def test_two_processes_resume_too(tmp_path: Path) -> None:
    (weights, r), (others, s) = spawn(several, 2, tmp_path)
    assert r == s
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_second_fit_goes_on(tmp_path: Path) -> None:
    trainer, model, callback = fit(tmp_path)
    first = callback.oialr
    trainer.fit_loop.max_epochs = EPOCHS + 1
    trainer.fit(model, DataLoader(DATA, batch_size=8))
    assert first is not None
    assert callback.oialr is not None
    assert callback.oialr.t == trainer.global_step > first.t
    assert callback.oialr.r.keys() == first.r.keys()


def test_what_cannot_work_is_refused_at_the_start_of_fit(tmp_path: Path) -> None:
    for strategy in ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
        trainer = SimpleNamespace(world_size=1, strategy=type(strategy, (), {})(), callbacks=[])
        with pytest.raises(ModelError, match=f"Lightning's {strategy} cannot be used .* Use strategy='ddp'"):
            OIALRCallback(CONFIG).setup(trainer, Net(), "fit")
    with pytest.raises(ModelError, match="callback WeightAveraging keeps a copy of the weights"):
        fit(tmp_path, more=[lightning.callbacks.EMAWeightAveraging()])
    manual = Net()
    manual.automatic_optimization = False
    trainer = lightning.Trainer(accelerator="cpu", logger=False, callbacks=[OIALRCallback(CONFIG)], max_steps=1)
    with pytest.raises(ModelError, match="optimizes manually.*after optimizer.step"):
        trainer.fit(manual, DataLoader(DATA, batch_size=8))
    plain = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, max_steps=1, enable_progress_bar=False, enable_checkpointing=False
    )
    plain.fit(Net(), DataLoader(DATA, batch_size=8))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match="plain.ckpt holds no 'oialr': it was made without OIALRCallback"):
        fit(tmp_path, tmp_path / "plain.ckpt")
