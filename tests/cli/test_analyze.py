"""``oialr analyze``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hpc_oialr import spectra
from hpc_oialr.cli.main import main


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    paths = [tmp_path / f"{name}.pt" for name in ("first", "last")]
    for path in paths:
        torch.save({f"{x}.weight": torch.randn(12, 9, generator=generator) for x in "ab"}, path)
    return [str(path) for path in paths]


def test_writes_and_prints_the_path(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "new" / "spectra.h5")
    words = [*files, "--out", out, "--steps", "0", "900", "--include", "b", "--device", "cpu"]
    assert main(["analyze", *words]) == 0
    assert capsys.readouterr().out.strip() == out
    with spectra.open(out) as run:
        assert run.layers == ("b",)
        assert run["b"].t.tolist() == [0, 900]
    assert main(["spectra", "show", out]) == 0
    assert "b" in capsys.readouterr().out


def test_errors_in_one_line(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a_file").touch()
    out = tmp_path / "a_file" / "spectra.h5"
    assert main(["analyze", *files, "--out", str(out)]) == 2
    assert "--steps is None; must be given" in capsys.readouterr().err
    assert main(["analyze", *files, "--steps", "1", "2", "--out", str(out)]) == 2
    assert f"oialr: error: {out} cannot be written" in capsys.readouterr().err
