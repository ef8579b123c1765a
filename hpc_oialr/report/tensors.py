"""Which components of a tensor stand out of noise, by each of its unfoldings, against random-matrix theory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpc_oialr.errors import ConfigError, DataError
from hpc_oialr.linalg.noise_spectra import (
    MultilinearNoiseEdge,
    noise_level,
    predicted_alignment,
    predicted_strength,
    unfolded_shapes,
)
from hpc_oialr.linalg.tensors import mlsvd
from hpc_oialr.report.checkpoint import Checkpoint, open_checkpoint

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Mode:
    """One unfolding, n x others, in the units of :mod:`~hpc_oialr.linalg.noise_spectra`.

    ``xi`` are its values, descending, ``edge`` is where noise ends, ``energy`` the share of all squared values that lie
    beyond, ``strengths`` are the rho of these by theory, and ``alignments`` the squared inner products of their vectors
    with the components', predicted.
    """

    n: int
    others: int
    xi: Tensor
    edge: float
    energy: float
    strengths: tuple[float, ...]
    alignments: tuple[float, ...]

    @property
    def c(self) -> float:
        """Aspect ratio."""
        return self.n / self.others


@dataclass(frozen=True)
class TensorAnalysis:
    """A tensor's unfoldings; ``r`` are the sizes of a core by :class:`~hpc_oialr.MultilinearNoiseEdge`."""

    name: str
    shape: tuple[int, ...]
    noise: float  # standard deviation of an entry
    r: tuple[int, ...]
    modes: tuple[Mode, ...]


def analyze_tensor(T: Tensor, rule: MultilinearNoiseEdge | None = None, *, name: str = "tensor") -> TensorAnalysis:
    """Singular values of every unfolding, those beyond noise, and what theory says of them.

    The noise is that of ``rule``, by default estimated from the median singular value. Raises as
    :func:`~hpc_oialr.mlsvd`, and :class:`DataError` for a tensor without noise.
    """
    rule, shape = rule or MultilinearNoiseEdge(), tuple(T.shape)
    spectra = mlsvd(T, name=name).spectra
    noise = noise_level(spectra, shape) if rule.noise is None else rule.noise
    if not noise > 0:
        raise DataError(
            f"{name} has no noise to compare with: half of the singular values of its largest unfolding are 0. Say how "
            "large noise would be: --noise."
        )
    modes = []
    for s, (n, others) in zip(spectra, unfolded_shapes(shape), strict=True):
        c, s = n / others, s.double()
        xi, limit = (s.square() / (noise**2 * others) - 1) / math.sqrt(c), rule.edge(n, others, noise)
        beyond = s > limit
        edge = (limit**2 / (noise**2 * others) - 1) / math.sqrt(c)
        strengths = tuple(predicted_strength(float(each), c) for each in xi[beyond])
        energy = float(s[beyond].square().sum() / s.square().sum())
        alignments = tuple(predicted_alignment(rho, c) for rho in strengths)
        modes.append(Mode(n, others, xi, edge, energy, strengths, alignments))
    return TensorAnalysis(name, shape, noise, rule.choose(spectra, shape), tuple(modes))


def open_tensors(path: Path, patterns: Sequence[str] = ("*",)) -> Checkpoint:
    """The tensors of at least three modes in a ``.npy`` file or a checkpoint whose names match one of ``patterns``.

    Raises :class:`DataError` if there is none, and as :func:`~hpc_oialr.report.checkpoint.open_checkpoint`.
    """
    held = _of_numpy(path) if path.suffix == ".npy" else open_checkpoint(path)
    shapes = {
        name: shape
        for name, shape in held.shapes.items()
        if sum(n > 1 for n in shape) > 2 and any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    if not shapes:
        names = ", ".join(f"{name} {shape}" for name, shape in list(held.shapes.items())[:5]) or "none"
        raise DataError(
            f"{path} holds no tensor of three modes or more named {', '.join(patterns)}; it has: {names}. Matrices are "
            "for oialr analyze."
        )
    return Checkpoint(path, shapes, lambda name: _squeezed(held.tensor(name)))


def _squeezed(T: Tensor) -> Tensor:
    return T.reshape([n for n in T.shape if n > 1])


def _of_numpy(path: Path) -> Checkpoint:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; must be a .npy file.") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} is no complete .npy file of numbers ({error}); write it by numpy.save.") from error
    if array.dtype.kind not in "fiu":
        raise DataError(f"{path} holds values of dtype {array.dtype}; must be real numbers.")
    T = torch.from_numpy(array.astype(np.float64 if array.dtype.itemsize > 4 else np.float32))
    return Checkpoint(path, {path.stem: tuple(T.shape)}, lambda name: T)


def draw(analysis: TensorAnalysis) -> Figure:
    """Of each mode the values, the law of noise, its edge, and the values beyond it."""
    from hpc_oialr.report.plots import in_style

    figure: Figure = in_style(_draw)(analysis)
    return figure


def _draw(analysis: TensorAnalysis) -> Figure:
    from hpc_oialr.report.plots import BLACK, GREY, VERMILION, new_figure, with_grid

    figure, axes = new_figure("double", height=0.75, ncols=len(analysis.modes), squeeze=False)
    for number, (mode, place) in enumerate(zip(analysis.modes, axes[0], strict=True)):
        found = len(mode.strengths)
        bulk = mode.xi[found:].numpy()
        place.hist(bulk, bins=min(40, max(5, len(bulk) // 4)), density=True, color="0.85", label="values")
        x = np.linspace(-2, 2, 400) + math.sqrt(mode.c)
        place.plot(x, noise_law(x, mode.c), color=BLACK, label="noise, theory")
        place.axvline(mode.edge, color=GREY, linestyle="--", label="edge")
        place.plot(mode.xi[:found], np.zeros(found), "o", color=VERMILION, clip_on=False, label="beyond the edge")
        if found and mode.xi[0] > 20:
            place.set_xscale("symlog", linthresh=4)
        with_grid(place).set_xlabel(r"eigenvalue $\xi$")
        place.set_title(f"mode {number}: {mode.n} x {mode.others}, {found} found")
    axes[0][0].legend(loc="upper right")
    axes[0][0].set_ylabel("density")
    return figure


def noise_law(xi: np.ndarray, c: float) -> np.ndarray:
    """Density of noise's values that are not 0, Marchenko and Pastur's law in the units of ``xi``."""
    x = 1 + math.sqrt(c) * xi
    # (b - x)(x - a) with a, b = (1 -+ sqrt c)^2 is c (4 - (xi - sqrt c)^2).
    inside = np.clip(4 - (xi - math.sqrt(c)) ** 2, 0, None)
    law: np.ndarray = c * np.sqrt(inside) / (2 * np.pi * min(c, 1.0) * np.maximum(x, 1e-12))
    return law


def require_one(names: Sequence[str]) -> str:
    """The one name; ConfigError if there are more."""
    if len(names) > 1:
        raise ConfigError("--plot", f"{len(names)} tensors", "draws one", fix=f"Choose it: --name {names[0]}")
    return names[0]
