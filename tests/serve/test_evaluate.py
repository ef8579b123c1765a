from __future__ import annotations

import json

import pytest
import torch
from support.tiny_runs import write_recipe

from hpc_oialr.cli.main import main
from hpc_oialr.distributed import World
from hpc_oialr.models import Autoformer
from hpc_oialr.record.run_folder import RunFolder
from hpc_oialr.serve.evaluate import evaluate_runs
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import train
from hpc_oialr.train.tasks import Classification, Forecasting


@pytest.fixture(scope="module")
def found(compared):
    return evaluate_runs([compared], batches=[1, 8], repeats=3)


def test_all_forms_give_the_metrics_of_the_run(compared, found):
    dense, merged, factored = found["models"]
    assert [row["form"] for row in found["models"]] == ["dense", "merged", "factored"]
    for row, side in ((dense, "dense"), (merged, "oialr"), (factored, "oialr")):
        summary = RunFolder(compared / side).read_summary()
        assert row["metrics"]["accuracy"] == pytest.approx(summary["metric"], abs=1e-9)
        assert row["step"] == summary["steps"]
    assert merged["metrics"]["loss"] == pytest.approx(factored["metrics"]["loss"], rel=1e-5)
    assert merged["parameters"] == dense["parameters"] > factored["parameters"]


def test_sizes_and_times(found):
    dense, merged, factored = found["models"]
    assert dense["file_bytes"] == pytest.approx(4 * dense["parameters"], rel=0.5)
    assert factored["file_bytes"] < merged["file_bytes"]
    for row in found["models"]:
        assert row["peak_memory_bytes"] > 4 * row["parameters"]
        for batch, speed in zip((1, 8), row["speed"], strict=True):
            assert speed["batch"] == batch
            assert 0 < speed["p10_ms"] <= speed["median_ms"] <= speed["p90_ms"]
            assert speed["units_per_s"] == pytest.approx(1e3 * batch / speed["median_ms"])
    assert all(speed["time_ratio"] == 1 for speed in dense["speed"])


def test_command(compared, tmp_path, capsys):
    checkpoint, out = compared / "oialr" / "checkpoints" / "step_00000012", tmp_path / "e.json"
    words = ["eval", str(checkpoint), "--split", "validation", "--repeats", "1", "--out", str(out)]
    assert main([*words, "--data.count", "9"]) == 0
    table = capsys.readouterr().out
    assert "9 samples of TinyImages (validation), fp32, cpu" in table
    assert "merged" in table
    assert "images per s" in table
    assert json.loads(out.read_text())["models"][0]["step"] == 12
    assert main(words) == 0  # replaces its own output
    for more, text in (
        (["--model.dim", "4"], "--model.dim cannot be set for a trained model"),
        (["--step", "7"], "holds no run"),
        (["--repeats", "0"], "must, like repeats, be at least 1"),
        (["--device", "abacus"], "device is 'abacus'"),
    ):
        assert main([*words, *more]) == 2
        assert text in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["bf16", "bf16-params", "float64"])
def test_precision_of_the_passes(compared, precision):
    (run,) = [compared / "oialr"]
    found = evaluate_runs([run], settings=["--train.precision", precision], batches=[2], repeats=1)
    exact = evaluate_runs([run], batches=[2], repeats=1)
    for row, other in zip(found["models"], exact["models"], strict=True):
        assert row["metrics"]["loss"] == pytest.approx(other["metrics"]["loss"], rel=2e-2)
        assert (row["metrics"]["loss"] == other["metrics"]["loss"]) is False


def test_text_is_judged_by_perplexity(tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 8})
    run = train(load_config(recipe), tmp_path / "run", world=World.single("cpu"))
    merged, factored = evaluate_runs([run.folder], batches=[1], repeats=1)["models"]
    assert merged["metrics"]["bits_per_byte"] == pytest.approx(run.summary["metric"], rel=1e-5)
    assert factored["metrics"]["perplexity"] == pytest.approx(merged["metrics"]["perplexity"], rel=1e-5)


def test_the_five_first_answers():
    task, labels = Classification(), torch.tensor([0, 4, 5])
    logits = torch.arange(7.0, 0, -1).expand(3, -1)  # the order of classes is 0, 1, ...

    class Fixed(torch.nn.Module):
        def forward(self, pixel_values):
            return type("Output", (), {"logits": logits})

    metrics = task.metrics(task.totals(Fixed(), {"pixel_values": torch.zeros(3, 1, 1, 1), "labels": labels}))
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["top5_accuracy"] == pytest.approx(2 / 3)


def test_a_forecast_needs_no_future():
    torch.manual_seed(0)
    past, future = torch.randn(2, 13), torch.randn(2, 4)
    batch = {
        "past_values": past,
        "past_observed_mask": torch.ones_like(past),
        "past_time_features": torch.randn(2, 13, 1),
        "future_values": future,
        "future_observed_mask": torch.ones_like(future),
        "future_time_features": torch.randn(2, 4, 1),
    }
    small = {"dim": 8, "encoder_layers": 1, "heads": 2, "mlp_dim": 8, "label_length": 4, "moving_average": 3}
    model, task = Autoformer(**small).build(batch).eval(), Forecasting()
    known = {name: batch[name] for name in task.served(batch)}
    assert not any(name.startswith("future_v") for name in known)
    with torch.no_grad():
        mean = task.predict(model, known)
        metrics = task.metrics(task.totals(model, batch))
    assert metrics["mse"] == pytest.approx(float((mean - future).square().mean()), rel=1e-5)
