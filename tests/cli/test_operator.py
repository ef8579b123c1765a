"""``oialr operator``: what it writes, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from hpc_oialr.cli.main import main


def test_a_matrix_and_an_operator_in_the_plane(tmp_path, capsys):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((size, 6)))[0] for size in (12, 9))
    np.save(tmp_path / "A.npy", left * np.array([5, 3, 2, 0.3, 0.2, 0.1]) @ right.T)
    out = tmp_path / "matrix"
    words = ["operator", "matrix", "--matrix", str(tmp_path / "A.npy"), "--functions", "3", "--out", str(out)]
    assert main([*words, "--steps", "150", "--lr", "0.1", "--nesting", "joint"]) == 0
    assert capsys.readouterr().out.rstrip().endswith(str(out))
    result = json.loads((out / "eigenvalues.json").read_text())
    np.testing.assert_allclose(result["values"], [5, 3, 2], rtol=1e-3)
    np.testing.assert_allclose(result["exact"], [5, 3, 2], rtol=1e-6)
    assert min(result["alignments"]) > 0.999
    assert result["settings"]["nesting"] == "joint"
    assert load_file(out / "functions.safetensors")["0.weight"].shape == (12, 3)
    assert main(words) == 2
    assert "eigenvalues.json exists already, and a solution would write over it" in capsys.readouterr().err
    out = tmp_path / "hydrogen"
    assert main(["operator", "hydrogen", "--functions", "2", "--steps", "2", "--batch", "16", "--out", str(out)]) == 0
    assert (out / "functions.png").read_bytes().startswith(b"\x89PNG")
    assert "alignments" not in json.loads((out / "eigenvalues.json").read_text())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["hydrogen", "--matrix", "A.npy"], "goes with the recipe matrix, not hydrogen"),
        (["matrix", "--matrix", "A.npy"], "A.npy is no file of numbers written by numpy.save"),
        (["matrix", "--functions", "301"], "functions is 301; must be at most 300"),
        (["hydrogen", "--nesting", "both"], "unknown nesting 'both'"),
    ],
)
def test_what_the_user_can_put_right(words, text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "A.npy").write_text("none")
    assert main(["operator", *words, "--out", "out"]) == 2
    assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
