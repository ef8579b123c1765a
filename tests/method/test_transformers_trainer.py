"""transformers' ``Trainer``: resumed runs and the best model are what they should be, or the call to make is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpc_oialr import OIALR, FixedFraction, OIALRConfig, RankLimits, match_structure, merge
from hpc_oialr.errors import ModelError

pytest.importorskip("accelerate", reason="Trainer needs it")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("default")

STEPS, WEIGHTS = 10, "model.safetensors"


class Samples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.randint(0, 31, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": x, "labels": x}


class Callback(transformers.TrainerCallback):  # type: ignore[misc]
    """What the README says: a step of the controller after the optimizer's, its state beside the model's."""

    def __init__(self, oialr: OIALR | None = None) -> None:
        self.oialr = oialr

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **rest: Any
    ) -> None:
        if self.oialr is None:
            self.oialr = controller(model, optimizer)
        if state.global_step:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self.oialr.load_state_dict(json.loads((folder / "oialr.json").read_text()))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        assert self.oialr is not None
        self.oialr.step()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        assert self.oialr is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / "oialr.json").write_text(json.dumps(self.oialr.state_dict()))


def controller(model: nn.Module, optimizer: Any) -> OIALR:
    limits = RankLimits(round_to=1, max_drop=0.3)
    return OIALR(model, optimizer, OIALRConfig(delay=3, frequency=3, rule=FixedFraction(0.5), limits=limits))


def gpt() -> Any:
    torch.manual_seed(0)
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    size = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **none))


def fit(folder: Path, resume: Path | None = None, *, own: bool = True, first: Any = None, **more: Any) -> Any:
    """Train; with an ``own`` optimizer and the controller before Trainer, or all of it made by Trainer."""
    model = gpt()
    if first is not None:
        first(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2) if own else None
    callback = Callback(controller(model, optimizer) if own else None)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{name: value for name, value in more.items() if name != "compute_metrics"},
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Samples(),
        eval_dataset=Samples(),
        optimizers=(optimizer, None),
        callbacks=[callback],
        compute_metrics=more.get("compute_metrics"),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert callback.oialr is not None
    return model, callback.oialr.r


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(merge(a).parameters(), merge(b).parameters(), strict=True))


@pytest.mark.parametrize("own", [True, False])
def test_resumes_as_if_never_stopped(tmp_path: Path, own: bool) -> None:
    whole, r = fit(tmp_path, own=own)
    assert r
    for step in (2, 4, 8):
        stored = tmp_path / f"checkpoint-{step}"

        def first(model: nn.Module, stored: Path = stored) -> None:
            match_structure(model, safetensors.load_file(stored / WEIGHTS))

        resumed, again = fit(tmp_path, stored, own=own, first=None if own else first)
        assert again == r
        assert same(whole, resumed)
    if not own:
        with pytest.raises(ModelError, match=r"match_structure\(model, state_dict\)"):
            fit(tmp_path, tmp_path / "checkpoint-8", own=own)


@pytest.mark.parametrize("best", [2, 4])
def test_the_best_model_is_loaded_at_the_end(tmp_path: Path, best: int) -> None:
    """Of the dense phase, and of another r."""
    scores = iter(float(step == best) for step in range(2, 100, 2))
    model, _ = fit(
        tmp_path,
        compute_metrics=lambda _: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
    )
    stored, here = safetensors.load_file(tmp_path / f"checkpoint-{best}" / WEIGHTS), model.state_dict()
    assert here.keys() - stored.keys() == {"lm_head.weight"}, "tied"
    assert all(torch.equal(here[name], value) for name, value in stored.items())
