"""What a space file may say, and that it fits its recipe."""

from __future__ import annotations

import pytest
from support.tiny_runs import write_recipe

from hpc_oialr.errors import OIALRError
from hpc_oialr.recipes import recipes
from hpc_oialr.search.space import as_arguments, check_space, read_space
from hpc_oialr.train.load_config import load_config

LR = "optimizer.lr: {kind: float, range: [1e-3, 1e-1], log: true}"


def space_of(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return read_space(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("space: {", "is no valid YAML"),
        ("optimizer.lr: 3", "must hold a mapping 'space'"),
        (f"space: {{{LR}}}\nfixt: {{}}", "unknown section 'fixt' (from space.yaml); valid: fixed, space."),
        (
            f"space: {{{LR}}}\nfixed: {{optimizer.lr: 1}}",
            "optimizer.lr is 1 (from space.yaml); is searched, and cannot",
        ),
        ("space: {optimizer.lr: 3}", "optimizer.lr is 3 (from space.yaml); must be a mapping with kind: float, int or"),
        ("space: {a: {kind: float, rnge: [1, 2]}}", "unknown key of a 'rnge' (from space.yaml)"),
        ("space: {a: {kind: float, range: [2, 1]}}", "a.range is [2, 1] (from space.yaml); must be two numbers, the"),
        ("space: {a: {kind: float, range: [1, .inf]}}", "must be two numbers"),
        ("space: {a: {kind: int, range: [1.5, 2]}}", "must be two whole numbers"),
        (
            "space: {a: {kind: int, range: [0, 2], log: true}}",
            "a.log is True (from space.yaml); must be true or false;",
        ),
        ("space: {a: {kind: choice, values: [1]}}", "must be a list of at least two plain values"),
        ("space: {a: {kind: choice, values: [1, 2], log: true}}", "is a choice, which has values but neither"),
        ("space: {a: {kind: int, range: [1, 2], values: [1, 2]}}", "belongs to a choice, not to kind int"),
    ],
)
def test_what_is_no_space(text, said, tmp_path):
    with pytest.raises(OIALRError) as error:
        space_of(tmp_path, text)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("space", "settings", "said"),
    [
        ("optimizer.lrr: {kind: float, range: [1, 2]}", [], "unknown setting 'optimizer.lrr' (from space.yaml)"),
        (
            "oialr.rule.fraction: {kind: float, range: [0.5, 2]}",
            [],
            "oialr.rule.fraction is 2.0 (from space.yaml); must",
        ),
        ("optimizer: {kind: choice, values: [AdamW, Adamw]}", [], "unknown optimizer type 'Adamw' (from space.yaml)"),
        (LR, ["--optimizer.lr", "1e-2"], "optimizer.lr is 0.01 (from the command line); is searched, by space.yaml."),
        (LR, ["--data.validation_fraction", "0"], "data.validation_fraction is 0; leaves no validation data, by which"),
    ],
)
def test_what_does_not_fit_the_recipe(space, settings, said, tmp_path):
    found = space_of(tmp_path, f"space: {{{space}}}")
    with pytest.raises(OIALRError) as error:
        check_space(write_recipe(tmp_path), found, settings)
    assert said in str(error.value)


def test_values_of_the_recipe_itself(tmp_path):
    others = "oialr.delay: {kind: int, range: [1, 9]}, optimizer: {kind: choice, values: [AdamW, SGD]}"
    space = space_of(tmp_path, f"space: {{{LR}, {others}}}")
    recipe = write_recipe(tmp_path, optimizer={"class_path": "AdamW", "init_args": {"lr": 0.02}})
    assert space.own_values(load_config(recipe)) == {"optimizer.lr": 0.02, "oialr.delay": 6, "optimizer": "AdamW"}
    assert space.own_values(load_config(recipe, ["--oialr.delay", "0.5"])) is None
    assert space.own_values(load_config(recipe, ["--optimizer.lr", "1"])) is None


@pytest.mark.parametrize("recipe", recipes())
def test_spaces_of_the_package(recipe):
    space = read_space(recipe)
    fixed = as_arguments(space.fixed)
    assert space.own_values(load_config(recipe, fixed)), "the recipe itself must be a point of its space"
    for end in (0, -1):
        load_config(recipe, [*fixed, *as_arguments({n: each.ends[end] for n, each in space.dimensions.items()})])
