"""CIFAR-10: 50,000 training and 10,000 test colour images of ten classes, 32 x 32 (Krizhevsky 2009)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hpc_oialr.data.augment import FlipAndCrop
from hpc_oialr.data.base import DataConfig, Splits
from hpc_oialr.data.cache import cache_root
from hpc_oialr.data.catalog import CIFAR10_IMAGES, CIFAR10_RECORD, CIFAR10_TEST, CIFAR10_TRAIN, describe
from hpc_oialr.data.image_arrays import ImageArrays, split_off
from hpc_oialr.errors import ConfigError, DataError

log = logging.getLogger(__name__)

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""Of each channel, as in the published runs."""

_SIDE, _CLASSES = 32, 10


@dataclass(frozen=True, kw_only=True)
class CIFAR10(DataConfig):
    """CIFAR-10 from its binary files, ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``.

    Parameters
    ----------
    data_dir
        Folder of the files (or of a folder ``cifar-10`` or ``cifar-10-batches-bin`` with them). Not given:
        the cache.
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

    num_labels: ClassVar[int] = _CLASSES
    num_channels: ClassVar[int] = 3
    image_size: ClassVar[int] = _SIDE

    def __post_init__(self) -> None:
        self._check_limit()
        if self.validation < 0:
            raise ConfigError(
                "data.validation", self.validation, "must not be negative", fix="5000 is usual."
            )

    def folder(self) -> Path:
        """The first folder that has the files.

        Raises
        ------
        DataError
            No folder has them; lists where it was looked.
        """
        root = cache_root() if self.data_dir is None else Path(self.data_dir)
        places = [root / "cifar-10", root / "cifar-10-batches-bin"]
        places = places[:1] if self.data_dir is None else [root, *places]
        return describe("cifar-10").find(places, "CIFAR-10")

    def _load(self) -> Splits:
        folder = self.folder()
        parts = [read_records(folder / name) for name in CIFAR10_TRAIN]
        images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        if self.validation >= len(labels):
            rule = f"must be below {len(labels)}, the number of training images"
            raise ConfigError("data.validation", self.validation, rule)
        train = ImageArrays(images, labels, mean=MEAN, std=STD, augment=self.augment)
        test = ImageArrays(*read_records(folder / CIFAR10_TEST), mean=MEAN, std=STD)
        if len(train) + len(test) != 6 * CIFAR10_IMAGES:
            log.warning("%s holds %d images, not the 60000 of CIFAR-10.", folder, len(train) + len(test))
        return replace(split_off(train, self.validation, test), classes=self.num_labels)


def read_records(path: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 3, 32, 32] and labels int64 [N] of a binary file: records of a label and 3 planes.

    Raises
    ------
    DataError
        The file cannot be read, is no whole number of records, or has labels above 9.
    """
    fix = f"Delete it and get it again. {describe('cifar-10').fix}"
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. {fix}") from error
    if not len(content) or len(content) % CIFAR10_RECORD:
        raise DataError(
            f"{path} is damaged: it has {len(content)} bytes, no whole number of records of "
            f"{CIFAR10_RECORD} bytes. {fix}"
        )
    records = torch.from_numpy(content).view(-1, CIFAR10_RECORD)
    labels = records[:, 0].to(torch.int64)
    if int(labels.max()) >= _CLASSES:
        raise DataError(f"{path} is damaged: label {int(labels.max())}, but CIFAR-10 has 0 to 9. {fix}")
    return records[:, 1:].reshape(-1, 3, _SIDE, _SIDE).contiguous(), labels
