"""ZeRO 1, 2, 3: the run of one process, state kept bit for bit, no rebuild without need, no memory lost, clear errors."""

from __future__ import annotations

import gc
import json
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from support.deepspeed_workers import (
    CONVERTED,
    CUTS,
    Net,
    Run,
    alone,
    bytes_after,
    evaluated,
    held_bytes_a_number,
    trained,
    trained_with_copies,
    zero,
)
from support.spawn import spawn

from hpc_oialr import Selection, muon_adamw
from hpc_oialr.distributed import World
from hpc_oialr.engines import DeepSpeed, SingleEngine
from hpc_oialr.engines.deepspeed import import_deepspeed
from hpc_oialr.engines.deepspeed_json import ZeroConfig, read_config, sizes
from hpc_oialr.errors import ConfigError, DataError, MissingExtraError, ModelError

installed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is missing: pip install 'hpc_oialr[deepspeed]'"
)
KINDS = [
    (1, "fp32", "AdamW"),
    (2, "fp32", "SGD"),
    (3, "fp32", "AdamW"),
    (2, "bf16", "AdamW"),
    (3, "bf16", "AdamW"),
]
# Stage 3 hands three copies of its input to a self-attention, which then does not call its input projection.
BY_INPUTS: dict[str, Any] = {
    "importance": "inputs",
    "moments_steps": 2,
    "selection": Selection(exclude=("attend.in_proj",)),
}

GROWING: dict[str, Any] = {"grow": 0.2, "frequency": 6, "selection": BY_INPUTS["selection"]}


def on_two(rank: int, size: int) -> dict[str, Any]:
    """All that needs two processes, in one start of them: that takes longer than the rest."""
    import_deepspeed(World.from_environment(device="cpu", timeout_s=60))
    gc.freeze()  # DeepSpeed searches for garbage often
    results: dict[str, Any] = {str(kind): trained(*kind) for kind in KINDS}
    results["with copies"] = trained_with_copies()
    results["by inputs"] = Run(zero(3), **BY_INPUTS).train().losses
    grown = Run(zero(3), **GROWING).train()
    results["grown"] = grown.losses, grown.oialr.r
    results["held"] = held_bytes_a_number(3)
    results["outputs"] = evaluated(3)
    results["bytes"] = {stage: bytes_after(stage, [2, 4]) for stage in (2, 3)}
    results["muon"] = muon_refused()
    results["load"] = load_refused()
    return results


def load_refused() -> str:
    """A state of another r, into a model in training."""
    run = Run(zero(2)).train(CONVERTED)
    cut = Run(SingleEngine()).train(CUTS[0]).module.state_dict()
    with pytest.raises(ModelError) as caught:
        run.module.load_state_dict(cut)
    return str(caught.value)


def muon_refused() -> str:
    net, engine = Net(), zero(2)
    with pytest.raises(ModelError) as caught:
        engine.wrap(net, muon_adamw(net))
    return str(caught.value)


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return spawn(on_two, 2)


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_one_process(two: list[dict[str, Any]], kind: tuple[int, str, str]) -> None:
    _, precision, optimizer = kind
    reference = alone(precision, optimizer)
    for result in (of_process[str(kind)] for of_process in two):
        assert result["r"] == reference.oialr.r
        if precision == "fp32":
            assert result["losses"] == pytest.approx(reference.losses, rel=1e-4)
        else:
            # bf16 has 8 bits; here the whole module is in it, on one process only what autocast takes.
            assert result["losses"] == pytest.approx(reference.losses, rel=0.02)


@installed
@pytest.mark.parametrize("kind", KINDS)
def test_made_anew_only_for_new_shapes(two: list[dict[str, Any]], kind: tuple[int, str, str]) -> None:
    for of_process in two:
        assert of_process[str(kind)]["made"] == [1, CONVERTED, *CUTS]


@installed
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[2] == "AdamW"])
def test_a_rebuild_keeps_every_bit(two: list[dict[str, Any]], kind: tuple[int, str, str]) -> None:
    """fp32 values, both moments and the step counter of every parameter, changed or not."""
    for of_process in two:
        assert of_process[str(kind)]["kept"] == [True] * 3


@installed
def test_one_copy_of_fp32_values_trains_as_two_do(two: list[dict[str, Any]]) -> None:
    for of_process in two:
        assert of_process["with copies"] == of_process[str((3, "fp32", "AdamW"))]["losses"]


@installed
def test_bases_grow_as_on_one_process(two: list[dict[str, Any]]) -> None:
    expected, frozen = (Run(SingleEngine(), **GROWING | {"grow": grow}).train() for grow in (0.2, 0.0))
    assert expected.oialr.r != frozen.oialr.r
    for of_process in two:
        losses, r = of_process["grown"]
        assert r == expected.oialr.r
        assert losses == pytest.approx(expected.losses, rel=1e-4)


@installed
def test_bases_by_inputs_are_those_of_one_process(two: list[dict[str, Any]]) -> None:
    expected = Run(SingleEngine(), **BY_INPUTS).train().losses
    by_weights = Run(SingleEngine(), **BY_INPUTS | {"importance": "weights"}).train().losses
    for of_process in two:
        assert of_process["by inputs"] == pytest.approx(expected, rel=1e-4)
        assert of_process["by inputs"][CONVERTED:] != pytest.approx(by_weights[CONVERTED:], rel=1e-4)


@installed
def test_another_r_is_not_loaded_into_a_model_in_training(two: list[dict[str, Any]]) -> None:
    for of_process in two:
        assert "DeepSpeedEngine cannot take on in a model that is in use: make a fresh" in of_process["load"]


@installed
def test_stage_3_holds_a_process_share_and_small_buffers(two: list[dict[str, Any]]) -> None:
    """Parameter, gradient and two moments, 16 bytes a number, are shared by two; a buffer takes 4 / 32."""
    for of_process in two:
        assert 8 <= of_process["held"] < 8 + 4 / 32 + 0.1


@installed
def test_the_module_itself_can_be_called(two: list[dict[str, Any]]) -> None:
    run, ids, expected = Run(SingleEngine()), torch.arange(10).view(2, 5), []
    for _ in range(2):
        run.train(2)
        expected += run.module.eval()(ids).flatten().tolist()
        run.module.train()
    for of_process in two:
        assert of_process["outputs"] == pytest.approx(expected, rel=1e-4, abs=1e-6)


@installed
def test_rebuilds_leave_no_memory_behind(two: list[dict[str, Any]]) -> None:
    for of_process in two:
        for early, late in of_process["bytes"].values():
            assert late == early


@installed
def test_muon_is_refused_with_what_to_take(two: list[dict[str, Any]]) -> None:
    text = two[0]["muon"]
    assert text.startswith("the optimizer is MuonAdamW; under DeepSpeed it must be one of ASGD, Adadelta, Adagrad")
    assert text.endswith("Take the engine DDP or FSDP for Muon.")


def on_four(rank: int, size: int) -> dict[str, Any]:
    World.from_environment(device="cpu", timeout_s=100)
    torch.use_deterministic_algorithms(True)  # fresh memory is full of NaN, the padding of ZeRO's parts too
    return trained(3)


@installed
@pytest.mark.long
def test_zero_3_on_four() -> None:
    reference = alone()
    for result in spawn(on_four, 4):
        assert result["r"] == reference.oialr.r
        assert result["losses"] == pytest.approx(reference.losses, rel=1e-4)
        assert result["kept"] == [True] * 3


# -- bad input ---------------------------------------------------------------------------------------


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DS_ACCELERATOR"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(
        MissingExtraError,
        match=r"the engine DeepSpeed needs deepspeed. Install it with: pip install 'hpc_oialr\[deep",
    ):
        import_deepspeed(World.single("cpu"))


def test_one_process_needs_no_deepspeed() -> None:
    assert isinstance(DeepSpeed(stage=3).build(World.single("cpu"), "fp32"), SingleEngine)


def test_float64_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.precision is 'float64'; must be fp32, bf16 or fp16 under DeepSpeed"):
        DeepSpeed().build(World(size=2), "float64")


def test_files(tmp_path) -> None:
    with pytest.raises(DataError, match=r"none\.json: No such file"):
        read_config(str(tmp_path / "none.json"))
    path = tmp_path / "ds.json"
    path.write_text("{")
    with pytest.raises(DataError, match="is not valid JSON"):
        read_config(str(path))
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="must hold a JSON object, not a list"):
        read_config(str(path))
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    assert ZeroConfig(read_config(str(path)), "fp32", "ds.json").stage == 2


@pytest.mark.parametrize("given", [{}, {"zero_optimization": {"stage": 0}}])
def test_without_zero(given: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError,
        match=r"zero_optimization.stage is 0 \(from ds.json\); must be 1, 2 or 3. Without ZeRO take the",
    ):
        ZeroConfig(given, "fp32", "ds.json")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"optimizer": {"type": "AdamW"}},
            r"optimizer is {'type': 'AdamW'} \(from ds.json\); must not be there: the recipe's optimizer is used. Remove",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "the recipe's schedule is used"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param is .* parameters stay on the device",
        ),
    ],
)
def test_sections_that_cannot_work(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        made(given)
    made({"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}})


def made(given: dict[str, Any], precision: str = "fp32") -> ZeroConfig:
    """Of stage 2 unless it says something else."""
    return ZeroConfig({"zero_optimization": {"stage": 2}} | given, precision, "ds.json")


def test_precision_must_agree() -> None:
    with pytest.raises(
        ConfigError,
        match=r"bf16.enabled is True \(from ds.json\); must agree with train.precision, which is fp32.",
    ):
        made({"bf16": {"enabled": True}})
    with pytest.raises(ConfigError, match="bf16.enabled is False"):
        made({"bf16": {"enabled": False}}, "bf16")
    stage_1 = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
    with pytest.raises(ConfigError, match=r"data_types.grad_accum_dtype is 'fp32' .*Take stage 2."):
        made(stage_1, "bf16")
    made({"fp16": {"enabled": "auto"}}, "bf16")


RECIPE: dict[str, Any] = {"ranks": 4, "global_batch": 64, "accumulation": 2, "clip": 1.0}


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        (
            "train_batch_size",
            32,
            r"train_batch_size is 32 \(from ds.json\); must be 64, as train.global_batch says.",
        ),
        (
            "train_micro_batch_size_per_gpu",
            64,
            r"must be 8, as train.global_batch / \(train.accumulation x 4 ranks",
        ),
        ("gradient_accumulation_steps", 1, "must be 2, as train.accumulation says"),
        (
            "gradient_clipping",
            0.5,
            'must be 1.0, as train.gradient_clip says. Write "auto", or change the recipe.',
        ),
    ],
)
def test_a_step_must_be_the_recipes(key: str, value: float, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        made({key: value}).check_step(**RECIPE)


def test_auto_is_filled_in() -> None:
    given = {
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": False},
    }
    made(given).check_step(**RECIPE)
    content = made(given, "bf16").filled(trained=3200, parameters=3200)
    assert content["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 100, "overlap_comm": False}
    assert content["bf16"]["enabled"] is True
    assert content["fp16"]["enabled"] is False
    assert "auto" not in json.dumps(content)
    assert given["bf16"] == {"enabled": "auto"}, "what was given stays as it is"


def test_sizes_follow_the_model_and_what_is_given_stays() -> None:
    assert sizes(320_000, 640_000, 3) == {
        "reduce_bucket_size": 10_000,
        "stage3_prefetch_bucket_size": 20_000,
        "stage3_max_reuse_distance": 20_000,
        "stage3_max_live_parameters": 80_000,
        "stage3_param_persistence_threshold": 800,
    }
    assert sizes(10**12, 10**12, 3) == {
        "reduce_bucket_size": 500_000_000,
        "stage3_prefetch_bucket_size": 50_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_param_persistence_threshold": 100_000,
    }, "DeepSpeed's own"
    given = {"stage": 3, "reduce_bucket_size": 10**6, "stage3_param_persistence_threshold": 0}
    zero = made({"zero_optimization": given}).filled(trained=320_000, parameters=640_000)
    assert zero["zero_optimization"] == sizes(320_000, 640_000, 3) | given | {"reduce_bucket_size": 320_000}
