"""Fashion-MNIST: 60,000 training and 10,000 test images of clothes, 28 x 28 grey (arXiv 1708.07747)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from hpc_oialr.data.augment import FlipAndCrop
from hpc_oialr.data.base import DataConfig, Splits
from hpc_oialr.data.cache import cache_root
from hpc_oialr.data.catalog import FASHION_MNIST_SYSTEM_FOLDER, describe
from hpc_oialr.data.idx import parse_idx, verified_bytes
from hpc_oialr.data.image_arrays import ImageArrays, split_off
from hpc_oialr.errors import ConfigError

MEAN, STD = 0.2860, 0.3530
"""Of all pixels of the training images, scaled to [0, 1]."""

_IMAGES = 60_000


@dataclass(frozen=True, kw_only=True)
class FashionMNIST(DataConfig):
    """Fashion-MNIST from a folder, the cache, or the Debian package's folder, checked by sha256.

    Parameters
    ----------
    data_dir
        Folder of the four .gz files (or of a folder ``fashion-mnist`` with them). Not given: the
        cache, then ``/usr/share/datasets/fashion-mnist``.
    validation
        Training images set aside, the last of a fixed permutation: the same for every seed.
    augment
        Random flip and crop of the training images.
    limit
        Use only the first so many training images.
    """

    data_dir: str | None = None
    validation: int = 0
    augment: FlipAndCrop = field(default_factory=FlipAndCrop)
    limit: int | None = None

    num_labels: ClassVar[int] = 10
    num_channels: ClassVar[int] = 1
    image_size: ClassVar[int] = 28

    def __post_init__(self) -> None:
        self._check_limit()
        if not 0 <= self.validation < _IMAGES:
            raise ConfigError(
                "data.validation",
                self.validation,
                f"must lie in [0, {_IMAGES}), the number of training images",
                fix="5000 is usual.",
            )

    def folder(self) -> Path:
        """The first folder that has the files; not yet checked.

        Raises
        ------
        DataError
            No folder has them; lists where it was looked.
        """
        dataset = describe("fashion-mnist")
        if self.data_dir is not None:
            places = [Path(self.data_dir), Path(self.data_dir) / dataset.name]
        else:
            places = [cache_root() / dataset.name, Path(FASHION_MNIST_SYSTEM_FOLDER)]
        return dataset.find(places, "Fashion-MNIST")

    def _load(self) -> Splits:
        folder = self.folder()
        train = ImageArrays(*read_part(folder, "train"), mean=MEAN, std=STD, augment=self.augment)
        test = ImageArrays(*read_part(folder, "t10k"), mean=MEAN, std=STD)
        return replace(split_off(train, self.validation, test), classes=self.num_labels)


def read_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 1, 28, 28] and labels int64 [N] of ``train`` or ``t10k``."""
    dataset = describe("fashion-mnist")
    arrays = []
    for name in (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"):
        fix = f"Delete it and get it again. {dataset.fix}"
        arrays.append(parse_idx(verified_bytes(folder / name, dataset.files[name], fix=fix), name))
    return arrays[0].unsqueeze(1), arrays[1].to(torch.int64)
