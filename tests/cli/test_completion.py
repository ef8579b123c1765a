"""The completion script as a shell uses it."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from hpc_oialr.cli.main import COMMANDS, main
from hpc_oialr.errors import MissingExtraError
from hpc_oialr.recipes import recipes

BASH = shutil.which("bash")
COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 ))
"$(complete -p oialr | sed 's/.*-F \\([^ ]*\\).*/\\1/')" oialr "${COMP_WORDS[COMP_CWORD]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    pytest.importorskip("shtab")
    from contextlib import redirect_stdout

    path = tmp_path_factory.mktemp("bash") / "oialr"
    with path.open("w") as file, redirect_stdout(file):
        assert main(["completion", "bash"]) == 0
    return path


@pytest.mark.skipif(BASH is None, reason="there is no bash")
def test_bash_completes_commands_options_and_recipes(script):
    def complete(*words):
        done = subprocess.run(
            [BASH, "-c", COMPLETE, "bash", str(script), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert set(COMMANDS) <= set(complete("oialr", ""))
    assert complete("oialr", "ev") == ["eval"]
    assert complete("oialr", "export", "--form") == ["--format"]
    assert "onnx" in complete("oialr", "export", "--format", "")
    assert set(recipes()) <= set(complete("oialr", "train", ""))


def test_without_shtab_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "zsh"]) == 2
    assert str(MissingExtraError("shtab", "completion", purpose="oialr completion")) in capsys.readouterr().err
