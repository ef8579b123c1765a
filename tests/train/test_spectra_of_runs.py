"""What a run leaves in its spectra: of the method, of dense phases, of steps; nothing lost by a stop or a resume."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.small_disk import fill, small_disk
from support.tiny_runs import merged, write_recipe
from support.train_workers import stop_at_step

from hpc_oialr.distributed import World
from hpc_oialr.errors import ConfigError
from hpc_oialr.linalg.basis_change import gram_products, stability_of
from hpc_oialr.method.decompositions import rotation_stability
from hpc_oialr.record import read_metrics
from hpc_oialr.spectra import Spectra, open, store
from hpc_oialr.spectra.files import write_flush
from hpc_oialr.train.checkpoint_store import CheckpointStore
from hpc_oialr.train.load_config import load_config
from hpc_oialr.train.run import Result, resume, train
from hpc_oialr.train.timing import StopRequest

DENSE: dict[str, Any] = {"oialr": None, "record": {"spectra": True, "frequency": 3}, "train": {"steps": 14}}


def run(folder: Path, *, stop_at: int | None = None, **over: Any) -> Result:
    folder.mkdir(parents=True, exist_ok=True)
    stop = None if stop_at is None else stop_at_step(stop_at)
    config = load_config(write_recipe(folder, **over))
    return train(config, folder / "run", world=World.single("cpu"), stop=stop)


def record(spectra: Spectra) -> dict[str, Any]:
    """All that does not depend on the clock."""
    fields = ("t", "kind", "r", "stability", "stable_rank", "noise_edge")
    return {
        name: (*(layer[field].tobytes() for field in fields), layer.singular_values.tobytes())
        for name, layer in spectra.items()
    } | {"steps": (spectra.steps["step"].tolist(), spectra.steps["loss"].tolist())}


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("default"))


def test_one_plain_file_with_all_attributes(default: Result) -> None:
    assert [path.name for path in default.folder.glob("*spectra*")] == ["spectra.h5"]
    with open(default.folder) as spectra:
        assert spectra.layers == tuple(default.summary["r"])
        attributes = spectra.attributes
        assert attributes["seed"] == 0
        assert attributes["world_size"] == 1
        assert json.loads(attributes["world"]) == {"size": 1, "local_size": 1, "launcher": "single"}
        assert attributes["git_commit"] == (spectra.environment["git"] or {}).get("commit", "")
        assert spectra.config["oialr"]["delay"] == 6
        assert spectra.environment["packages"]["torch"] == torch.__version__


def test_steps_are_those_of_the_metrics(default: Result) -> None:
    rows = [row for row in read_metrics(default.folder / "metrics.jsonl") if "metric" not in row]
    with open(default.folder) as spectra:
        steps = spectra.steps
        for name in ("step", "loss", "lr", "wall_s", "data_wait_s"):
            assert steps[name].tolist() == [row[name] for row in rows]
        assert steps["trained_parameters"][0] == default.summary["dense_trainable_params"]
        assert steps["trained_parameters"][-1] == default.summary["trainable_params"]
        assert steps["memory_bytes"][-1] == pytest.approx(default.summary["peak_memory_gib"] * 2**30)
        assert 0 < steps["update_s"][-1] < steps["wall_s"][-1]
        assert (np.diff(steps["eval_s"]) >= 0).all()


def test_the_full_rank_phase_can_be_measured_and_changes_nothing(default: Result, tmp_path: Path) -> None:
    measured = run(tmp_path, record={"spectra": True, "frequency": 2})
    assert measured.summary is not None
    assert measured.summary["weights_sha256"] == default.summary["weights_sha256"]
    with open(measured.folder) as spectra, open(default.folder) as plain:
        for name, layer in spectra.items():
            # The step of the conversion measures first.
            assert layer.t.tolist() == [2, 4, 6, *plain[name].t]
            assert layer.kinds[:4] == ["stability", "stability", "stability", "conversion"]
            assert layer.r[:3].tolist() == [layer.k] * 3
            assert np.isnan(layer.stability[[0, 3]]).all()
            assert ((layer.stability[1:3] > 0) & (layer.stability[1:3] <= 1)).all()
            assert layer.singular_values[3:].tobytes() == plain[name].singular_values.tobytes()


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("dense"), **DENSE)


def test_a_dense_run(dense: Result, tmp_path: Path) -> None:
    plain = run(tmp_path, **merged(DENSE, {"record": {"spectra": None}}))
    assert plain.summary is not None
    assert plain.summary["weights_sha256"] == dense.summary["weights_sha256"]
    with open(plain.folder) as spectra:
        assert len(spectra) == 0
        assert spectra.steps["step"].tolist() == list(range(1, 15))
    with open(dense.folder) as spectra:
        assert len(spectra) > 2
        for layer in spectra.values():
            assert layer.t.tolist() == [3, 6, 9, 12]
            assert set(layer.kinds) == {"stability"}
            assert np.isnan(layer.stability[0])
            assert ((layer.stability[1:] > 0) & (layer.stability[1:] <= 1)).all()
            assert not np.isnan(layer.singular_values).any()
            assert (layer["seconds"] > 0).all()


@pytest.mark.parametrize("stop_at", [4, 6, 11])
def test_a_dense_run_that_is_resumed(dense: Result, tmp_path: Path, stop_at: int) -> None:
    """The bases of the last measurement are in the checkpoint."""
    stopped = run(tmp_path, stop_at=stop_at, **DENSE)
    assert stopped.summary is None
    resumed = resume(stopped.folder, world=World.single("cpu"))
    assert resumed.summary is not None
    assert resumed.summary["weights_sha256"] == dense.summary["weights_sha256"]
    with open(resumed.folder) as spectra, open(dense.folder) as whole:
        assert record(spectra) == record(whole)


def test_nothing_is_written_if_it_is_not_wanted(tmp_path: Path) -> None:
    result = run(tmp_path, record={"spectra": False}, train={"steps": 8})
    assert not list(result.folder.glob("*spectra*"))


def test_a_checkpoint_comes_after_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on from it finds all that was before it."""
    found: list[tuple[int, int, int]] = []
    save = CheckpointStore.save

    def looked(store: CheckpointStore, step: int, *arguments: Any) -> None:
        with open(tmp_path / "run") as spectra:
            events = [int(layer.t[-1]) for layer in spectra.values()]
            found.append((step, max(events, default=0), int(spectra.steps["step"][-1])))
        save(store, step, *arguments)

    monkeypatch.setattr(CheckpointStore, "save", looked)
    run(tmp_path, checkpoint={"every": 2}, train={"steps": 12})
    assert found == [(2, 0, 2), (4, 0, 4), (6, 6, 6), (8, 6, 8), (10, 10, 10), (12, 10, 12)]


def train_while_full(tmp_path: Path, disk: Path, **settings: dict[str, Any]) -> Result:
    """A run on a disk without any room from its eighth step to its twentieth."""
    steps = itertools.count(1)

    def asked() -> str:
        step = next(steps)
        if 8 <= step < 20:
            fill(disk, left=0)
        if step == 20:
            (disk / "of_somebody_else").unlink()
        return ""

    recipe = write_recipe(tmp_path, **settings)
    return train(load_config(recipe), disk / "run", world=World.single("cpu"), stop=StopRequest(asked))


def test_a_run_on_a_disk_that_is_full_for_a_while(
    default: Result, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "small", kib=3000) as disk:
        result = train_while_full(tmp_path, disk, checkpoint={"every": None})
        assert result.summary is not None
        assert result.summary["weights_sha256"] == default.summary["weights_sha256"]
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert all("cannot be written ([Errno 28] No space left on device" in text for text in warnings)
        files = [Path(text.partition(" cannot")[0]).name for text in warnings]
        assert len(files) == len(set(files)), "one for each file"
        assert {"metrics.jsonl", "spectra.h5"} <= set(files)
        assert not list(disk.glob("run/spectra.h5?*"))
        with open(result.folder) as spectra, open(default.folder) as whole:
            assert record(spectra) == record(whole)
        for name in ("metrics.jsonl", "updates.jsonl"):
            written, expected = (read_metrics(path / name) for path in (result.folder, default.folder))
            assert [row["step"] for row in written] == [row["step"] for row in expected]


def test_a_run_goes_on_without_room_for_a_checkpoint(
    default: Result, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "small", kib=3000) as disk:
        result = train_while_full(tmp_path, disk, checkpoint={"every": 5})
        assert result.summary is not None
        assert result.summary["weights_sha256"] == default.summary["weights_sha256"]
        text = "No space left on device"
        told = [r.getMessage() for r in caplog.records if "The training goes on" in r.getMessage()]
        assert [line.partition(":")[0] for line in told] == ["step 10", "step 15"]
        assert all(text in line and "Make room" in line for line in told)
        names = sorted(path.name for path in (disk / "run" / "checkpoints").glob("step_*"))
        assert names == ["step_00000020", "step_00000024"]


def test_a_checkpoint_that_is_ahead_of_the_spectra(
    default: Result, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for spectra but for checkpoints, then a crash: what the warning says brings everything back."""
    steps, full = itertools.count(1), False

    def asked() -> str:
        nonlocal full
        step = next(steps)
        full = step >= 6
        if step == 12:
            raise RuntimeError("crash")
        return ""

    def write(*arguments: Any) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_flush(*arguments)

    monkeypatch.setattr(store, "write_flush", write)
    recipe, folder = write_recipe(tmp_path, checkpoint={"every": 5}), tmp_path / "run"
    with pytest.raises(RuntimeError, match="crash"):
        train(load_config(recipe), folder, world=World.single("cpu"), stop=StopRequest(asked))
    warnings = [text for text in caplog.messages if "only in memory" in text]
    assert len(warnings) == 1
    assert "steps 6 to 10 are only in memory, and the checkpoint of step 10 is written" in warnings[0]
    full = False
    assert "delete checkpoints/step_* from step 6 on, then resume" in warnings[0]
    shutil.rmtree(folder / "checkpoints" / "step_00000010")
    result = resume(folder, world=World.single("cpu"))
    assert result.summary is not None
    with open(folder) as spectra, open(default.folder) as whole:
        assert record(spectra) == record(whole)


@pytest.mark.parametrize(
    ("setting", "value", "rule"),
    [
        ("frequency", "0", "must be at least 1 step"),
        ("spectra_queue", "0", "must be at least 1 event"),
    ],
)
def test_settings_out_of_range(tmp_path: Path, setting: str, value: str, rule: str) -> None:
    recipe = write_recipe(tmp_path)
    with pytest.raises(ConfigError, match=rf"record.{setting} is '?{value}'? \(from the command line\); {rule}"):
        load_config(recipe, [f"--record.{setting}", value])


def test_both_stabilities_are_the_same_measure() -> None:
    """Of a dense phase's basis and of a rotated one."""
    generator = torch.Generator().manual_seed(0)
    P, Qh = (torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    whole = torch.eye(6, dtype=torch.float64)
    direct = stability_of(*gram_products(whole, whole, P, Qh))
    assert float(rotation_stability(P, Qh)) == pytest.approx(direct, abs=1e-12)
