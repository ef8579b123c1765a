from __future__ import annotations

import pytest
from support.tiny_runs import write_recipe

from hpc_oialr import Budget, CumulativeSum, FixedFraction, OIALRConfig, RankRule
from hpc_oialr.distributed import World
from hpc_oialr.errors import ConfigError, OIALRError, UnknownNameError
from hpc_oialr.lowrank.execution import measured_crossover
from hpc_oialr.recipes import recipes
from hpc_oialr.train.command_line import parse_settings
from hpc_oialr.train.load_config import dense_twin, load_config
from hpc_oialr.train.optimizers import AdamW, MuonAdamW
from hpc_oialr.train.run_context import make_run_context

RULES = ", ".join(sorted(rule.__name__ for rule in RankRule.__subclasses__() if rule.__module__ == RankRule.__module__))


@pytest.fixture
def recipe(tmp_path):
    return write_recipe(tmp_path)


@pytest.mark.parametrize("name", sorted(recipes()))
def test_every_recipe_loads_with_its_twin(name):
    loaded = load_config(name)
    assert isinstance(loaded.config.oialr, OIALRConfig) or name == "finetune_bert"
    for own in (False, True):
        assert dense_twin(loaded, own=own).config.oialr is None
    assert recipes()[name].endswith(".")


def test_command_line_goes_over_yaml_over_defaults(recipe):
    config = load_config(recipe, ["--oialr.delay", "7", "--train.seed=3"]).config
    assert config.oialr.delay == 7
    assert config.train.seed == 3
    assert config.oialr.frequency == 4
    assert config.oialr.orthogonality_bound == "auto"


def test_a_choice_by_name_starts_from_its_defaults(recipe):
    config = load_config(
        recipe, ["--optimizer", "AdamW", "--oialr.rule", "CumulativeSum", "--oialr.rule.threshold", ".3"]
    )
    assert config.config.optimizer == AdamW()
    assert config.config.oialr.rule == CumulativeSum(0.3)


def test_settings_of_the_present_choice(recipe):
    config = load_config(recipe, ["--optimizer.lr", "1e-3", "--oialr.rule.fraction=.5"]).config
    assert isinstance(config.optimizer, MuonAdamW)
    assert config.optimizer.lr == 1e-3
    assert config.oialr.rule == FixedFraction(0.5)


def test_a_budget(recipe):
    loaded = load_config(recipe, ["--oialr.rule", "Budget", "--oialr.rule.operations", "0.3"])
    assert loaded.config.oialr.rule == Budget(operations=0.3)
    with pytest.raises(ConfigError, match=r"oialr.rule.operations is None; must be set, or rule.parameters"):
        load_config(recipe, ["--oialr.rule", "Budget"])


def test_null_switches_the_method_off(recipe):
    assert load_config(recipe, ["--oialr", "null"]).config.oialr is None
    assert load_config(recipe, ["--oialr", "null", "--oialr.delay", "9"]).config.oialr.delay == 9


def test_effective_text_is_a_recipe(recipe, tmp_path):
    # Words that YAML 1.1 or 1.2 takes for numbers stay words.
    words = ["--data.patterns", "['1e3', '0o7', '010', '1:30', '.NaN']", "--train.device", "'1e3'"]
    loaded = load_config(recipe, ["--oialr.delay", "7", "--dense.train.steps", "9", *words])
    path = tmp_path / "effective.yaml"
    path.write_text(loaded.text)
    again = load_config(path)
    assert again.config == loaded.config
    assert again.text == loaded.text


def test_dense_twin_takes_its_own_settings(recipe):
    loaded = load_config(recipe, ["--dense.train.steps", "9", "--dense.optimizer.lr", "0.3"])
    own, same = dense_twin(loaded, own=True).config, dense_twin(loaded, own=False).config
    assert (own.train.steps, own.optimizer.lr, own.optimizer.adamw_lr) == (
        9,
        0.3,
        loaded.config.optimizer.adamw_lr,
    )
    assert (same.train.steps, same.optimizer) == (24, loaded.config.optimizer)
    assert own.oialr is None


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            ["--train.epoch", "3"],
            UnknownNameError,
            "unknown setting 'train.epoch' (from the command line); valid: ",
        ),
        (["--train.epoch", "3"], UnknownNameError, "Did you mean 'train.epochs'?"),
        (["--trian.epochs", "3"], UnknownNameError, "Did you mean 'train'?"),
        (
            ["--oialr.rule", "RelativCutoff"],
            UnknownNameError,
            f"unknown oialr.rule type 'RelativCutoff' (from the command line); valid: {RULES}. Did you mean "
            "'RelativeCutoff'?",
        ),
        (
            ["--model", "hpc_oialr.nothing.GPT2"],
            UnknownNameError,
            "unknown model type 'hpc_oialr.nothing.GPT2'",
        ),
        (
            ["--model", "hpc_oialr.models.Model"],
            UnknownNameError,
            "unknown model type 'hpc_oialr.models.Model'",
        ),
        (
            ["--oialr.crossover", "no/file"],
            ConfigError,
            "or the result file of that benchmark (no/file: No such",
        ),
        (["--oialr.rule.beta", "0.1"], UnknownNameError, "valid: oialr.rule.fraction"),
        (["--dense.optimizer.lrr", "1"], UnknownNameError, "Did you mean 'dense.optimizer.lr'?"),
        (
            ["--oialr.rule", "RelativeCutoff", "--oialr.rule.beta", "1.3"],
            ConfigError,
            "oialr.rule.beta is 1.3 (from the command line); must lie in (0, 1). The paper uses 0.1-0.2.",
        ),
        (
            ["--oialr.limits.max_drop", "7"],
            ConfigError,
            "oialr.limits.max_drop is 7.0 (from the command line); must",
        ),
        (
            ["--train.steps", "abc"],
            ConfigError,
            "train.steps is 'abc' (from the command line); must be int | null.",
        ),
        (
            ["--optimizer.lr", "-1"],
            ConfigError,
            "optimizer.lr is -1.0 (from the command line); must not be negative.",
        ),
        (
            ["--model", "null"],
            ConfigError,
            "model is None (from the command line); must be set; valid: Autoformer, GPT2, Llama, PretrainedClassifier,",
        ),
        (
            ["--train.precision", "fp8"],
            ConfigError,
            "train.precision is 'fp8' (from the command line); must be 'fp32' | 'bf16' | 'bf16-params' | 'fp16' | ",
        ),
        (
            ["--oialr.factor_dtype", "abc"],
            ConfigError,
            "must be 'float64' | 'float32' | 'bfloat16' | 'float16' | null.",
        ),
        (
            ["--train.steps"],
            OIALRError,
            "--train.steps has no value; settings have the form --section.field value.",
        ),
        (["twenty"], OIALRError, "unexpected argument 'twenty'"),
        (
            ["--train.steps", "[1"],
            OIALRError,
            "--train.steps is '[1' (from the command line), which is no valid YAML",
        ),
    ],
)
def test_bad_settings(recipe, arguments, error, text):
    with pytest.raises(error) as caught:
        load_config(recipe, arguments)
    assert text in str(caught.value)


def test_bad_setting_in_a_file_names_the_file(tmp_path):
    recipe = write_recipe(tmp_path, oialr={"rule": {"class_path": "RelativeCutoff", "init_args": {"beta": 1.3}}})
    with pytest.raises(ConfigError, match=r"oialr.rule.beta is 1.3 \(from tiny.yaml\); must lie in \(0, 1\)"):
        load_config(recipe)
    recipe = write_recipe(tmp_path, trian={})
    with pytest.raises(UnknownNameError, match=r"unknown setting 'trian' \(from tiny.yaml\)"):
        load_config(recipe)


def test_unknown_recipe():
    with pytest.raises(UnknownNameError) as caught:
        load_config("fashion_mnist_vitt")
    assert "unknown recipe 'fashion_mnist_vitt'; valid: autoformer_etth1, autoformer_etth2," in str(caught.value)
    assert "Did you mean 'fashion_mnist_vit'?" in str(caught.value)


def test_no_length(tmp_path):
    recipe = write_recipe(tmp_path, train={"steps": None})
    with pytest.raises(ConfigError, match=r"train.epochs is None; must be set, or steps"):
        load_config(recipe)


@pytest.mark.parametrize(
    "text",
    [
        "train: [1",
        "train: " + "[" * 5000 + "]" * 5000,
        "train: {seed: 1" + "0" * 5000 + "}",
        "train: {steps: !!int x}",
        "train: {steps: !!bool x}",
        'train: {steps: "\\UFFFFFFFF"}',
        "data: {patterns: !!set {a, b}}",
    ],
)
def test_broken_yaml(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(OIALRError, match="broken.yaml is no valid YAML"):
        load_config(path)


@pytest.mark.parametrize(("text", "seed"), [("010", 10), ("0x10", 16), ("0o10", 8), ("1_000", 1000), ("+7", 7)])
def test_numbers_are_those_of_yaml_1_2(recipe, text, seed):
    assert load_config(recipe, ["--train.seed", text]).config.train.seed == seed


def test_parse_settings():
    tree = parse_settings(["--a.b", "1e-3", "--a.c=null", "--a.r", "Rule", "--a.r.x", "-2", "--flag", "true"])
    assert tree == {"a": {"b": 1e-3, "c": None, "r": {"class_path": "Rule", "x": -2}}, "flag": True}
    assert parse_settings(["--a.x", "1", "--a", "Name"]) == {"a": {"x": 1, "class_path": "Name"}}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model.depth", "abc"], "model.depth is 'abc' (from the command line); must be int"),
        (["--model.dropout", "null"], "model.dropout is None (from the command line); must be float"),
        (["--data.validation_fraction", "null"], "data.validation_fraction is None"),
        (["--train.seed", "null"], "train.seed is None (from the command line); must be int"),
        (["--train.seed", str(2**64)], f"must not go beyond {2**64 - 1}"),
        (["--train.seed", "1" + "0" * 400], "must not go beyond"),
        (["--optimizer.lr", ".nan"], "optimizer.lr is nan (from the command line); must be a finite number"),
        (["--optimizer.betas", "[.inf, 0.9]"], "must be a finite number"),
        (["--train.workers", "1000000000000"], "train.workers is 1000000000000"),
        (["--model.dim", "0"], "model.dim is 0"),
        (["--train.seed", "1:30"], "train.seed is '1:30' (from the command line); must be int"),
        (["--train.steps", "'24'"], "train.steps is '24' (from the command line); must be int | null"),
        (["--optimizer.betas", "[0.9, 1.0]"], "optimizer.betas is 1.0"),
        (["--optimizer", "AdamW", "--optimizer.eps", "-1"], "optimizer.eps is -1.0"),
        (["--model", "Autoformer", "--model.label_length", "-1"], "model.label_length is -1"),
        (["--engine", "''"], "unknown engine type ''"),
        (["--model", "..x.y"], "model is '..x.y' (from the command line); cannot be imported"),
        (["--dense.oialr.delay", "3"], "dense.oialr is {'delay': 3} (from the command line); has no effect"),
    ],
)
def test_every_value_has_its_type_and_is_finite(recipe, arguments, text):
    with pytest.raises(OIALRError) as raised:
        load_config(recipe, arguments)
    assert text in str(raised.value)


def test_a_file_of_a_setting_that_is_missing_is_named():
    with pytest.raises(OIALRError, match=r"nowhere\.json"):
        measured_crossover("nowhere.json")


def test_largest_seed(recipe):
    assert load_config(recipe, ["--train.seed", str(2**64 - 1)]).config.train.seed == 2**64 - 1


def test_a_key_given_twice_is_an_error(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("train: {steps: 3}\ncheckpoint: {keep: 1}\ntrain: {steps: 4}\n")
    with pytest.raises(OIALRError, match="'train' is given twice .*line 3"):
        load_config(path)


def test_a_date_is_text(recipe):
    assert load_config(recipe, ["--train.device", "2024-01-01"]).config.train.device == "2024-01-01"


def test_retired_settings_are_dropped_with_one_warning(tmp_path, caplog):
    path = write_recipe(tmp_path, record={"spectra_writer": "per_process"}, dense={"record": {"side_folder": "/x"}})
    loaded = load_config(path, ["--record.side_folder", "/y"])
    assert "side_folder" not in loaded.text
    assert "spectra_writer" not in loaded.text
    (message,) = caplog.messages
    assert message == (
        "settings that no longer have an effect are ignored: "
        "record.spectra_writer from tiny.yaml (rank 0 writes all spectra), "
        "dense.record.side_folder from tiny.yaml (while the disk is full spectra wait in memory), "
        "record.side_folder from the command line (while the disk is full spectra wait in memory)"
    )


def test_the_command_line_goes_over_the_dense_section(recipe):
    given = ["--dense.train.steps", "9", "--dense.optimizer.lr", "0.3"]
    path = recipe.with_name("with_dense.yaml")
    path.write_text(load_config(recipe, given).text)
    assert dense_twin(load_config(path), own=True).config.train.steps == 9
    typed = load_config(path, ["--train.steps", "4", "--oialr.delay", "2"])
    twin = dense_twin(typed, own=True).config
    assert (twin.train.steps, twin.optimizer.lr, twin.oialr) == (4, 0.3, None)
    both = load_config(path, ["--train.steps", "4", "--dense.train.steps", "5"])
    assert dense_twin(both, own=True).config.train.steps == 5


def test_data_model_and_task_must_fit(recipe):
    world = World.single("cpu")
    for arguments, text in (
        (
            ["--model.vocabulary", "100"],
            "model.vocabulary is 100; must be at least 256: the data have that many",
        ),
        (["--task", "Classification"], "task is 'Classification'; needs batches with 'pixel_values'"),
    ):
        with pytest.raises(ConfigError) as raised:
            make_run_context(load_config(recipe, arguments).config, world)
        assert text in str(raised.value)


def test_a_class_of_the_user_s_own(recipe, tmp_path, monkeypatch):
    (tmp_path / "own_schedules.py").write_text(
        "from dataclasses import dataclass\nfrom hpc_oialr.train.schedules import Constant\n"
        "@dataclass(kw_only=True)\nclass Mine(Constant):\n    start: int\n    ends: tuple[int, ...] | None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = ["--schedule", "own_schedules.Mine", "--schedule.ends"]
    with pytest.raises(ConfigError, match=r"schedule.start is None; must be set"):
        load_config(recipe, [*given, "null"])
    with pytest.raises(ConfigError, match=r"schedule.start is None \(from the command line\); must be set"):
        load_config(recipe, [*given, "null", "--schedule.start", "null"])
    loaded = load_config(recipe, [*given, "[1, 2]", "--schedule.start", "3"])
    assert (loaded.config.schedule.start, loaded.config.schedule.ends) == (3, (1, 2))
    assert loaded.tree["schedule"]["class_path"] == "own_schedules.Mine"
    assert loaded.tree["schedule"]["init_args"]["ends"] == [1, 2]
