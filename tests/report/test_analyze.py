"""Checkpoints made elsewhere give the record that the run itself would have left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.spawn import spawn
from torch import nn

from hpc_oialr import spectra
from hpc_oialr.distributed import World
from hpc_oialr.errors import ConfigError, DataError, NonFiniteError
from hpc_oialr.lowrank import Selection, select
from hpc_oialr.method.engine import SingleEngine
from hpc_oialr.method.stability_tracker import StabilityTracker
from hpc_oialr.report.analyze import MatrixSelection, analyze, layer_name, steps_of
from hpc_oialr.spectra.reader import Spectra
from hpc_oialr.train.checkpoint_store import CheckpointStore

STEPS = (20, 100, 1000)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(40, 12), nn.Linear(12, 30), nn.LayerNorm(30), nn.Linear(30, 24), nn.Conv1d(24, 8, 3)
    )


def states() -> list[dict[str, torch.Tensor]]:
    """One model's weights after each of STEPS."""
    model, generator = network(), torch.Generator().manual_seed(1)
    found = []
    for _ in STEPS:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
        found.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return found


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """State dicts by torch.save, named by step."""
    paths = [tmp_path / f"model_{step}.pt" for step in STEPS]
    for path, state in zip(paths, states(), strict=True):
        torch.save(state, path)
    return paths


def tables(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Events without their times, and singular values, of every layer."""
    with spectra.open(path) as run:
        fields = [name for name in spectra.schema.EVENT.names or () if name != "seconds"]
        return {name: (layer.events[fields], layer.singular_values) for name, layer in run.items()}


def assert_equal(first: Path, second: Path) -> None:
    ours, theirs = tables(first), tables(second)
    assert list(ours) == list(theirs)
    for name, (events, values) in ours.items():
        for field in events.dtype.names or ():
            np.testing.assert_array_equal(events[field], theirs[name][0][field], err_msg=f"{name} {field}")
        np.testing.assert_array_equal(values, theirs[name][1])


def by_watch() -> list[dict[str, dict[str, float | None]]]:
    """What a run measures of the same weights."""
    model = network()
    sites = select(model, Selection(exclude=("0",), keep_last=False))
    watch = StabilityTracker(sites, SingleEngine(World.single("cpu")), threshold=None)
    found = []
    for state in states():
        model.load_state_dict(state)
        found.append({update.name: vars(update) for update in watch.measure(sites)})
    return found


def test_what_the_run_itself_would_have_measured(files: list[Path], tmp_path: Path) -> None:
    out = analyze(files[::-1], tmp_path / "out.h5")
    expected = by_watch()
    with spectra.open(out) as run:
        # The embedding is the module "0", whose name does not tell.
        assert run.layers == ("0", "1", "3", "4")
        for name in run.layers[1:]:
            layer = run[name]
            assert layer.t.tolist() == list(STEPS)
            assert set(layer.kinds) == {"stability"}
            assert (layer.m, layer.n) == tuple(expected[0][name][side] for side in "mn")
            for row, update in enumerate(expected):
                np.testing.assert_array_equal(layer.spectrum(row), update[name]["singular_values"])
                for field in ("stability", "subspace_angle_U", "subspace_angle_Vh", "r_factor_distance"):
                    known = update[name][field]
                    assert layer[field][row] == pytest.approx(np.nan if known is None else known, nan_ok=True)
                assert layer["effective_rank"][row] > 1


def _analyze(rank: int, size: int, files: list[Path], out: Path) -> list[int]:
    world = World.from_environment(device="cpu")
    analyze(files, out, world=world)
    with spectra.open(out) as run:
        found = [len(layer) for layer in run.values()]
    world.close()
    return found


def test_two_processes_write_what_one_does(files: list[Path], tmp_path: Path) -> None:
    alone = analyze(files, tmp_path / "one.h5")
    assert spawn(_analyze, 2, files, tmp_path / "two.h5") == [[3, 3, 3, 3]] * 2
    assert_equal(alone, tmp_path / "two.h5")
    with spectra.open(tmp_path / "two.h5") as run:
        assert run.attributes["world_size"] == 2


def test_every_form_of_checkpoint_gives_the_same(files: list[Path], tmp_path: Path) -> None:
    expected = analyze(files, tmp_path / "torch.h5")
    store = CheckpointStore(tmp_path / "run" / "checkpoints", World.single("cpu"), keep=9)
    forms: dict[str, list[Path]] = {"safetensors": [], "nested": [], "own": [], "folder": []}
    for step, state in zip(STEPS, states(), strict=True):
        forms["safetensors"].append(tmp_path / f"{step}.safetensors")
        save_file(state, forms["safetensors"][-1])
        forms["nested"].append(tmp_path / f"epoch{step}.ckpt")
        wrapped = {f"module.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": wrapped, "optimizer": {"lr": 0.1}, "epoch": 3}, forms["nested"][-1])
        own = {f"model.{name}": tensor for name, tensor in state.items()} | {"rng.0": torch.zeros(4)}
        store.save(step, own, {"controller": {"r": {}}})
        forms["own"].append(store.path(step))
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        torch.save(state, folder / "pytorch_model.bin")
        forms["folder"].append(folder)
    for name, paths in forms.items():
        assert_equal(expected, analyze(paths, tmp_path / f"{name}.h5"))


def test_folders_of_transformers_whole_and_sharded(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    for name, size in (("whole-7", "1GB"), ("sharded-7", "40KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
    assert len(list((tmp_path / "sharded-7").glob("*.safetensors"))) > 1
    whole, sharded = (analyze([tmp_path / name], tmp_path / f"{name}.h5") for name in ("whole-7", "sharded-7"))
    assert_equal(whole, sharded)
    with spectra.open(whole) as run:
        layers = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        assert set(run.layers) == {f"transformer.h.{block}.{layer}" for block in range(2) for layer in layers}
        weight = model.transformer.h[1].mlp.c_fc.weight.detach()
        expected = np.linalg.svd(weight.numpy(), compute_uv=False)
        np.testing.assert_allclose(run["transformer.h.1.mlp.c_fc"].spectrum(0), expected, rtol=1e-4)


def test_plots_and_tables_read_it(files: list[Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from hpc_oialr.report.plots import stability

    with Spectra(analyze(files, tmp_path / "out.h5")) as run:
        lines = stability(run).axes[0].lines
        assert [len(line.get_xdata()) for line in lines] == [2] * 4
        assert len(run.to_pandas()) == 12


class Code:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("run",))


def test_code_in_a_pickle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.ones(4, 4), "extra": Code()}, tmp_path / "bad1.pt")
    with pytest.raises(DataError, match=r"bad1.pt holds more than tensors .* would run code .*safetensors"):
        analyze([tmp_path / "bad1.pt"], tmp_path / "out.h5")
    assert "run" not in capsys.readouterr().out
    assert not (tmp_path / "out.h5").exists()


def test_damaged_and_missing_files(files: list[Path], tmp_path: Path) -> None:
    content = files[0].read_bytes()
    cut = tmp_path / "cut1.pt"
    cut.write_bytes(content[: len(content) // 2])
    text = tmp_path / "text1.safetensors"
    text.write_text("no tensors")
    (tmp_path / "empty1").mkdir()
    listed = tmp_path / "plain1.pt"
    torch.save([1, 2], listed)
    for path, message in (
        (cut, "is not a complete torch file"),
        (text, "is not a complete safetensors file"),
        (tmp_path / "empty1", "holds no checkpoint: none of model.safetensors.index.json"),
        (tmp_path / "none1", "does not exist"),
        (listed, "holds no state dict"),
    ):
        with pytest.raises(DataError, match=f"{path.name} {message}"):
            analyze([path], tmp_path / "out.h5")


def test_a_low_rank_run_has_its_spectra_already(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", World.single("cpu"))
    store.save(5, {"model.0.U": torch.ones(4, 2)}, {"controller": {"r": {"0": 2}}})
    with pytest.raises(DataError, match=r"of a low-rank run \(1 layers\).*oialr export .* --step 5"):
        analyze([store.path(5)], tmp_path / "out.h5")


def test_checkpoints_must_be_of_one_model(tmp_path: Path) -> None:
    for step, shape in ((1, (4, 4)), (2, (4, 6))):
        torch.save({"a.weight": torch.eye(*shape)}, tmp_path / f"{step}.pt")
    with pytest.raises(DataError, match=r"layer a: .*1.pt holds 4 x 4, .*2.pt holds 4 x 6; .* one model"):
        analyze([tmp_path / "1.pt", tmp_path / "2.pt"], tmp_path / "out.h5")


def test_weights_must_be_finite(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.full((4, 4), torch.nan)}, tmp_path / "1.pt")
    with pytest.raises(NonFiniteError, match=r"a of .*1.pt holds 16 NaN"):
        analyze([tmp_path / "1.pt"], tmp_path / "out.h5")


def test_steps_must_be_known_and_different(files: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    names = ("checkpoint-500", "run2/step_00001000.pt", "step-1500/model.safetensors")
    assert steps_of([Path(name) for name in names]) == [500, 1000, 1500]
    with pytest.raises(ConfigError, match=r"--steps is \[1\]; must be one for each of the 3 checkpoints"):
        analyze(files, out, steps=[1])
    with pytest.raises(ConfigError, match=r"--steps is 5; belongs to several checkpoints, .*20.pt, .*100.pt"):
        analyze(files, out, steps=[5, 5, 6])
    (tmp_path / "last.pt").write_bytes(files[0].read_bytes())
    with pytest.raises(ConfigError, match="must be given: the name of .*last.pt holds no number"):
        analyze([tmp_path / "last.pt"], out)
    with spectra.open(analyze(files, out, steps=[9, 7, 8])) as run:
        assert run["1"].t.tolist() == [7, 8, 9]


def test_layers_of_tensors() -> None:
    names = ("module.encoder.0.weight", "attn.in_proj_weight", "encoder.0.bias")
    assert [layer_name(name) for name in names] == ["encoder.0", "attn.in_proj", None]


def test_which_matrices() -> None:
    shapes = {
        "h.10.fc.weight": (8, 8),
        "h.9.fc.weight": (8, 8),
        "h.9.fc.bias": (8,),
        "h.9.attn.in_proj_weight": (24, 8),
        "h.9.conv.weight": (8, 4, 3, 3),
        "embeddings.weight": (16, 8),
        "norm.weight": (8,),
        "head.weight": (200, 8),
    }
    names = [each.layer for each in MatrixSelection().matrices(shapes)]
    assert names == ["h.9.attn.in_proj", "h.9.conv", "h.9.fc", "h.10.fc"]
    wide = MatrixSelection(include=("h*",), exclude=("h.9*",), max_aspect=30).matrices(shapes)
    assert [(each.layer, each.m, each.n) for each in wide] == [("h.10.fc", 8, 8), ("head", 200, 8)]


def test_no_matrix_at_all(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"20.pt holds no matrix .* widen --include"):
        analyze(files, tmp_path / "out.h5", selection=MatrixSelection(include=("nothing",)))
