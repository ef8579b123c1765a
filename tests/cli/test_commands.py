from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml
from support.tiny_images import RECIPE
from support.tiny_runs import write_recipe

from hpc_oialr.cli.main import COMMANDS, main
from hpc_oialr.recipes import recipes


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path, train={"steps": 10})


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_train_prints_the_folder_and_a_table(recipe, tmp_path, capsys):
    code, out, err = run(capsys, "train", recipe, "--train.seed", 1, "--out", tmp_path / "run")
    assert code == 0
    assert out.rstrip().endswith(f"run folder: {tmp_path / 'run'}")
    assert "test bits per byte" in out
    assert "trained parameters" in out
    assert "conversion of" in err
    code, out, err = run(capsys, "train", recipe, "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert err.startswith("oialr: error: ")
    assert "already holds a run" in err
    code, out, err = run(capsys, "resume", tmp_path / "run")
    assert code == 0
    code, out, err = run(capsys, "export", tmp_path / "run", "--format", "lowrank")
    assert out.strip() == str(tmp_path / "run" / "export" / "lowrank")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train", "nonsense"], "unknown recipe 'nonsense'; valid: autoformer_etth1, autoformer_etth2"),
        (["train", "fashion_mnist_vit", "--train.stepz", "3"], "Did you mean 'train.steps'?"),
        (["train", "fashion_mnist_vit", "--oialr.rule", "Magic"], "unknown oialr.rule type 'Magic'"),
        (["recipes", "nonsense"], "unknown recipe 'nonsense'"),
        (["resume", "/nonexistent"], "/nonexistent holds no run"),
        (["export", "/nonexistent"], "/nonexistent/config.yaml"),
        (["data", "fetch", "nonsense"], "nonsense"),
        (["data", "sample", "nonsense", "x"], "unknown sample 'nonsense'; valid: cifar-10, ettm2, imagenet"),
        (["compare", "fashion_mnist_vit", "--oialr", "null"], "there is nothing to compare a dense run with"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(capsys, arguments, text):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert err.startswith("oialr: error: ")
    assert err.count("\n") == 1


def test_delay_after_the_last_step_warns(recipe, tmp_path, capsys):
    _, _, err = run(capsys, "train", recipe, "--oialr.delay", 99, "--out", tmp_path / "run")
    assert "oialr: warning: oialr.delay is 99 but the run has 10 steps" in err


def test_print_config_is_a_recipe(recipe, tmp_path, capsys):
    _, out, _ = run(capsys, "train", recipe, "--oialr.delay", 7, "--print_config")
    assert yaml.safe_load(out)["oialr"]["delay"] == 7
    (tmp_path / "again.yaml").write_text(out)
    assert run(capsys, "train", tmp_path / "again.yaml", "--print_config")[1] == out


def test_help_settings_explains_them(recipe, capsys):
    _, out, _ = run(capsys, "train", recipe, "--help_settings")
    assert "--train.global_batch" in out


def test_recipes(capsys):
    _, out, _ = run(capsys, "recipes")
    assert "fashion_mnist_vit" in out
    assert "Autoformer on a CSV" in out
    assert out.count("\n") - 1 == out.count(" Data: ") == len(recipes())
    assert "--paper, the published method" in out.splitlines()[-1]
    _, out, _ = run(capsys, "recipes", "text_gpt")
    assert yaml.safe_load(out)["model"]["class_path"] == "GPT2"


def test_info(capsys):
    assert "packages.torch" in run(capsys, "info")[1]
    assert "torch" in json.loads(run(capsys, "info", "--json")[1])["packages"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert f"oialr {command}" in capsys.readouterr().out.partition("examples:")[2]


def test_unknown_option_of_a_command_without_settings(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["recipes", "--oialr.delay", "3"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --oialr.delay" in capsys.readouterr().err


def test_module_and_entry_point_are_the_same():
    done = subprocess.run([sys.executable, "-m", "hpc_oialr", "recipes", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("oialr: error: unknown recipe")


def test_compare(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "tests")
    recipe = tmp_path / "images.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    folder = tmp_path / "both"
    assert main(["compare", str(recipe), "--own", "--out", str(folder)]) == 0
    out = capfd.readouterr().out
    assert out.rstrip().splitlines()[-1] == str(folder / "compare.json")
    assert "after OIALR's wall time" in out
    result = json.loads((folder / "compare.json").read_text())
    assert set(result) == {"dense", "oialr", "ratios", "metric_difference", "dense_metric_at_oialr_wall"}
    assert set(result["ratios"]) == {"wall", "peak_memory", "trainable"}
    assert result["dense"]["steps"] == 8
    assert result["oialr"]["steps"] == 12
    assert result["dense"]["r"] == {}
    assert result["oialr"]["r"]
    assert result["metric_difference"] == result["oialr"]["metric"] - result["dense"]["metric"]
    assert result["ratios"]["trainable"] < 1
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_stopped_comparison_goes_on_with_the_same_settings(tmp_path, capsys, monkeypatch):
    stub, recipe, folder = tmp_path / "python", tmp_path / "images.yaml", tmp_path / "both"
    stub.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/calls; exit 75\n')
    stub.chmod(0o755)
    recipe.write_text(yaml.safe_dump(RECIPE))
    monkeypatch.setattr(sys, "executable", str(stub))
    words = ["compare", str(recipe), "--own", "--train.seed", "3", "--out", str(folder)]
    for _ in range(2):
        assert main(words) == 75
        assert f"stopped on request; resume with: oialr {' '.join(words)}" in capsys.readouterr().out
    call = f"-m hpc_oialr train {folder}/dense.yaml --out {folder}/dense --continue"
    assert (tmp_path / "calls").read_text().splitlines() == [call, call]
    assert not (folder / "owner.json").exists()
    words[4] = "4"
    assert main(words) == 2
    assert "dense.yaml exists already, and this comparison would write over it" in capsys.readouterr().err
