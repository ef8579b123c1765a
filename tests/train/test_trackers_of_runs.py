"""`oialr train --tracker`: a run that was stopped and resumed, as TensorBoard shows it."""

from __future__ import annotations

import pytest
from support.tiny_runs import write_recipe
from support.train_workers import stop_at_step

from hpc_oialr.cli.main import main
from hpc_oialr.distributed import World
from hpc_oialr.record import RunFolder
from hpc_oialr.record.metrics import read_metrics
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import resume, train

pytest.importorskip("accelerate")
events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
pytestmark = pytest.mark.filterwarnings("default")
WORLD = World.single("cpu")


def test_all_rows_and_every_layers_r_of_a_resumed_run(tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": 12, "evaluations": 2}, checkpoint={"every": 5})
    loaded = load_config(recipe, ["--record.tracker", "tensorboard"])
    assert train(loaded, tmp_path / "run", world=WORLD, stop=stop_at_step(7)).summary is None
    assert resume(tmp_path / "run", world=WORLD).summary["steps"] == 12
    folder = RunFolder(tmp_path / "run")
    found = events.EventAccumulator(str(folder.logs), size_guidance={events.SCALARS: 0})
    found.Reload()
    tags = found.Tags()["scalars"]
    rows = read_metrics(folder.metrics)
    losses = [(row["step"], pytest.approx(row["loss"])) for row in rows if "split" not in row]
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == losses
    (split,) = {row["split"] for row in rows if row.get("split") == "validation"}
    assert len(found.Scalars(f"{split}/metric")) == sum(row.get("split") == split for row in rows)
    layers = [tag for tag in tags if tag.startswith("r/")]
    assert len(layers) == 4
    assert all([e.step for e in found.Scalars(tag)] == [6, 10] for tag in layers)


def test_the_option_of_the_command(tmp_path, capsys):
    recipe = write_recipe(tmp_path)
    assert main(["train", str(recipe), "--tracker", "tensorboard", "--print_config"]) == 0
    assert "tracker: tensorboard" in capsys.readouterr().out
    assert main(["train", str(recipe), "--tracker", "tensorbored", "--print_config"]) == 2
    assert "Did you mean 'tensorboard'?" in capsys.readouterr().err
