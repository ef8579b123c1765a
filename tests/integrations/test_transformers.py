"""transformers' ``Trainer``, the real library: resumed runs and the best model are what they should be, or it is said."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.spawn import spawn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hpc_oialr import FixedFraction, OIALRConfig, RankLimits, match_structure
from hpc_oialr.errors import CheckpointError, ConfigError, ModelError

pytest.importorskip("accelerate", reason="Trainer needs it")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
from hpc_oialr.integrations import transformers as integration  # noqa: E402
from hpc_oialr.integrations.transformers import OIALRCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")
STEPS = 10
# Conversion after step 3, updates after 6 and 9: as shares of the run.
CONFIG = OIALRConfig(
    delay=0.3, frequency=0.3, rule=FixedFraction(0.5), limits=RankLimits(round_to=1, max_drop=0.3), moments_steps=2
)


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randint(0, 31, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": x, "labels": x}


def gpt() -> Any:
    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    size = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **none))


def trainer_of(folder: Path, *, own: bool = False, compute_metrics: Any = None, **more: Any) -> Any:
    """A trainer with an ``own`` optimizer or its own, in which the callback is."""
    model = gpt()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **more,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Samples(),
        eval_dataset=Samples(),
        optimizers=(torch.optim.AdamW(model.parameters(), 1e-2) if own else None, None),
        compute_metrics=compute_metrics,
    )
    return trainer, OIALRCallback(trainer, CONFIG)


def fit(folder: Path, resume: Any = None, **more: Any) -> Any:
    trainer, callback = trainer_of(folder, **more)
    trainer.train(resume_from_checkpoint=resume)
    assert callback.oialr is not None
    assert callback.oialr.t == STEPS
    return trainer.model, callback.oialr.r


def stored(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, whole."""
    return {name: w.full_tensor() if isinstance(w, DTensor) else w for name, w in model.state_dict().items()}


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, others = stored(a), stored(b)
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.mark.parametrize("own", [True, False])
def test_resumes_as_if_never_stopped(tmp_path: Path, own: bool) -> None:
    whole, r = fit(tmp_path, own=own)
    assert r
    # True: the last one, after which nothing is left to do.
    for resume in (str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-8"), True):
        resumed, again = fit(tmp_path, resume, own=own)
        assert again == r
        assert same(whole, resumed)


@pytest.mark.parametrize("best", [2, 4])
def test_the_best_model_is_loaded_at_the_end(tmp_path: Path, best: int) -> None:
    """Of the dense phase, and of another r."""
    scores = iter(float(step == best) for step in range(2, 100, 2))
    model, _ = fit(
        tmp_path,
        own=True,
        compute_metrics=lambda _: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    loaded, here = safetensors.load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors"), model.state_dict()
    assert here.keys() - loaded.keys() == {"lm_head.weight"}, "tied"
    assert all(torch.equal(here[name], value) for name, value in loaded.items())


def force_fsdp() -> None:
    """Let accelerate choose FSDP where it has a plugin for it, on CPUs too."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    plain = AcceleratorState.__init__

    def make(self: Any, *args: Any, **options: Any) -> None:
        plain(self, *args, **options)
        if plugin := options.get("fsdp_plugin"):
            for state in (PartialState, AcceleratorState):
                state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}

    AcceleratorState.__init__ = make


def several(rank: int, size: int, folder: Path, sharded: bool) -> Any:
    """Under DDP, or FSDP2, which accelerate offers for GPUs only: its choice is forced, all else is its own code."""
    warnings.simplefilter("default")
    options: dict[str, Any] = {"fsdp": "full_shard", "fsdp_config": {"version": 2}} if sharded else {}
    if sharded:
        force_fsdp()
        with pytest.raises(ConfigError, match="load_best_model_at_end is True; loads another r"):
            trainer_of(folder, **options, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2)
    assert trainer_of(folder, **options)[0].args.world_size == size
    whole, r = fit(folder, **options)
    assert any(isinstance(p, DTensor) for p in whole.parameters()) == sharded
    if sharded:
        with pytest.raises(ModelError, match=r"checkpoint-4 has \d low-rank layers, .*Resume without FSDP"):
            trainer_of(folder, **options)[0].train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    for step in (2,) if sharded else (4, 8):
        trainer, callback = trainer_of(folder, **options)
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert callback.oialr is not None
        assert callback.oialr.r == r
        assert same(trainer.model, whole), f"resumed at {step}"
    return r, stored(whole), trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_resume_too(tmp_path: Path, sharded: bool) -> None:
    (r, weights, loss), (s, others, _) = spawn(several, 2, tmp_path, sharded)
    assert r
    assert r == s
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    model = gpt()
    match_structure(model, weights)
    model.load_state_dict(weights)
    samples = Samples()
    x = torch.stack([samples[i]["input_ids"] for i in range(len(samples))])
    # Trainer divides by the number of all labels, of which the first is not predicted.
    assert loss == pytest.approx(model(input_ids=x, labels=x).loss.item() * 7 / 8, rel=1e-4)


def test_checkpoints_that_do_not_fit_are_refused_before_any_work(tmp_path: Path) -> None:
    fit(tmp_path)
    trainer, _ = trainer_of(tmp_path / "other")
    path = tmp_path / "checkpoint-8/oialr.json"
    kept = path.read_text()
    path.write_text(kept.replace("transformer.h.0", "transformer.h.1"))
    with pytest.raises(ModelError, match="low-rank layer 'transformer.h.1.*another model"):
        trainer.train(resume_from_checkpoint=str(path.parent))
    path.write_text((tmp_path / "checkpoint-10/oialr.json").read_text())
    with pytest.raises(CheckpointError, match="is of step 8 and its OIALR state of step 10"):
        fit(tmp_path, str(path.parent))
    path.unlink()
    with pytest.raises(CheckpointError, match="oialr.json is missing: the checkpoint was made without OIALR"):
        fit(tmp_path, str(path.parent))


def test_what_cannot_work_is_refused_when_the_callback_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="auto_find_batch_size is True; .* Set per_device_train_batch_size"):
        trainer_of(tmp_path, auto_find_batch_size=True)
    trainer, _ = trainer_of(tmp_path)
    plain = {"load_best_model_at_end": False, "auto_find_batch_size": False, "deepspeed": None}
    for changes, error, message in (
        ({"is_deepspeed_enabled": True}, ConfigError, "deepspeed is None; .*oialr train --engine DeepSpeed"),
        ({"args": SimpleNamespace(**plain, n_gpu=2)}, ConfigError, "DataParallel on 2 GPUs.*torchrun"),
        ({"model": SimpleNamespace(peft_config={})}, ModelError, "has PEFT adapters"),
    ):
        before = {name: getattr(trainer, name) for name in changes}
        vars(trainer).update(changes)
        with pytest.raises(error, match=message):
            integration._require_supported(trainer)
        vars(trainer).update(before)


def test_a_second_call_of_train_goes_on_with_the_same_controller(tmp_path: Path) -> None:
    trainer, callback = trainer_of(tmp_path)
    trainer.train()
    first = callback.oialr
    trainer.train()
    assert callback.oialr is first
    assert first is not None
    assert first.t == 2 * STEPS
