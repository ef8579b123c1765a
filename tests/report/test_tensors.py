"""``oialr tensor``: components of a tensor in noise, found and drawn; what has none is refused."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hpc_oialr import MultilinearNoiseEdge
from hpc_oialr.cli.main import main
from hpc_oialr.linalg.noise_spectra import marchenko_pastur_median
from hpc_oialr.report.tensors import analyze_tensor, noise_law

SHAPE, RHO = (30, 36, 40), (40.0, 9.0)


def planted() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    T = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    for rho in RHO:
        vectors = [torch.randn(n, generator=generator).double() for n in SHAPE]
        u, v, w = (each / each.norm() for each in vectors)
        T += (rho * math.prod(SHAPE) ** 0.5) ** 0.5 * torch.einsum("i,j,k->ijk", u, v, w)
    return 3.0 * T


def test_strengths_are_those_that_were_planted_whatever_the_noise() -> None:
    for rule in (MultilinearNoiseEdge(), MultilinearNoiseEdge(noise=3.0)):
        found = analyze_tensor(planted(), rule)
        assert found.r == (2, 2, 2)
        assert found.noise == pytest.approx(3.0, rel=0.05)
        for mode in found.modes:
            assert mode.strengths == pytest.approx(RHO, rel=0.25)
            assert 0.95 < mode.alignments[1] < mode.alignments[0] < 1


@pytest.mark.parametrize("c", [1e-6, 0.1, 1.0, 3.0])
def test_the_law_of_noise_has_mass_one_and_its_median(c: float) -> None:
    xi = np.linspace(-2, 2, 400_001) + c**0.5
    mass = np.cumsum(noise_law(xi, c)) * (xi[1] - xi[0])
    assert mass[-1] == pytest.approx(1, abs=2e-3)
    if 1e-3 < c <= 1:
        median = 1 + c**0.5 * xi[np.searchsorted(mass, mass[-1] / 2)]
        assert median == pytest.approx(marchenko_pastur_median(c), abs=3e-3)


def test_the_command_shows_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("field.npy", "field.pt", "field.safetensors")]
    np.save(paths[0], planted().numpy())
    torch.save(planted(), paths[1])
    save_file({"field": planted(), "other": planted()[:9], "matrix": torch.ones(3, 4)}, paths[2])
    printed = []
    for path in paths:
        assert main(["tensor", str(path), "--name", "field"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2]
    assert "field, 30 x 36 x 40: noise 3" in printed[0]
    assert "core 2 x 2 x 2" in printed[0]
    figure = tmp_path / "field.svg"
    assert main(["tensor", str(paths[0]), "--plot", str(figure)]) == 0
    assert capsys.readouterr().out.endswith(f"{figure}\n")
    assert "mode 2: 40 x 1080, 2 found" in figure.read_text()
    for words, text in (
        ([str(paths[2]), "--plot", str(figure)], "--plot is '2 tensors'; draws one"),
        ([str(paths[2]), "--name", "matrix"], "holds no tensor of three modes or more named matrix; it has: field"),
        ([str(tmp_path / "none.npy")], "none.npy does not exist"),
    ):
        assert main(["tensor", *words]) == 2
        assert text in capsys.readouterr().err
