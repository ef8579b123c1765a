"""Random settings and command lines give a run or one line that says what to put right, never a traceback.

For many more than these: ``OIALR_CASES=1500@1000 pytest tests/cli/test_fuzz.py``.
"""

from __future__ import annotations

import itertools
import random
import shutil

import pytest
from support.cases import seeds
from support.tiny_runs import write_recipe

from hpc_oialr.cli.main import main
from hpc_oialr.train.load_config import flat, load_config

VALUES = (
    *("null", ".nan", ".inf", "-1", "0", "1", "2", "3.5", "1e12", "1000000000000", str(2**63), str(2**64)),
    *("0.5", "1e-30", "abc", "''", "é", "true", "[]", "[1, 2]", "[null]", "{}", "{a: 1}", "{a: 1, a: 2}"),
    *("'0'", "1" + "0" * 400, "2024-01-01", "0x10", "!!python/object:os.system", "*", "&a", "'\\0'"),
    *("AdamW", "SGD", "DDP"),
    *("FSDP", "Energy", "NoiseEdge", "ViT", "GPT2", "Classification", "{class_path: Adam}", "{init_args: 3}"),
)
# Valid but heavy, or known to wait for something.
HEAVY = ("train.steps", "train.epochs", "train.workers", "model.depth", "model.dim", "train.timeout_s")
CHOICES = ("data", "model", "task", "optimizer", "schedule", "oialr", "oialr.rule", "engine", "dense")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    return write_recipe(folder, train={"steps": 2, "evaluations": 1}, oialr={"delay": 1, "frequency": 1})


def command_lines(recipe, few):
    names = [*flat(load_config(recipe).tree), *CHOICES]
    for seed in seeds(few):
        rng = random.Random(seed)
        pairs = [(rng.choice(names).removesuffix(".class_path"), rng.choice(VALUES)) for _ in range(rng.randint(1, 3))]
        yield list(itertools.chain.from_iterable((f"--{name}", value) for name, value in pairs))


def ends_well(capsys, arguments):
    try:
        code = main(arguments)
    except SystemExit as left:
        code = left.code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("oialr: error: ")]
    assert (code, len(errors)) == (0, 0) or (code == 2 and len(errors) == 1 and err.endswith(errors[0] + "\n"))


def test_settings_are_a_recipe_or_an_error(recipe, capsys):
    for settings in command_lines(recipe, 150):
        ends_well(capsys, ["train", str(recipe), *settings, "--print_config"])


def test_settings_run_or_are_an_error(recipe, capsys, tmp_path):
    for settings in command_lines(recipe, 36):
        if any(name in str(settings) for name in HEAVY):
            continue
        out = tmp_path / "run"
        ends_well(capsys, ["train", str(recipe), *settings, "--out", str(out)])
        shutil.rmtree(out, ignore_errors=True)


WORDS = (
    *(
        "train",
        "resume",
        "export",
        "spectra",
        "show",
        "watch",
        "report",
        "analyze",
        "recipes",
        "data",
        "fetch",
        "info",
    ),
    *(
        "plan",
        "jobs",
        "logs",
        "cancel",
        "compare",
        "nonsense",
        "",
        "--out",
        "--format",
        "--layers",
        "-f",
        "--",
        "-x",
    ),
    *(
        "/dev/null",
        "/nonexistent/file",
        "/proc/self/mem",
        "a" * 300,
        "é",
        "..",
        "1",
        "-1",
        "--force",
    ),
)


def test_any_words_end_well(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in seeds(120):
        rng = random.Random(seed)
        words = [rng.choice(WORDS) for _ in range(rng.randint(1, 4))]
        if words[0] in ("data", "compare", "plan"):
            continue  # fetching, training and planning have tests of their own
        try:
            code = main(words)
        except SystemExit as left:
            code = left.code
        captured = capsys.readouterr()
        assert code in (0, 1, 2)
        assert "Traceback" not in captured.err
