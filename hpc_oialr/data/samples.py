"""Tiny stand-ins for data sets that are large or must be fetched by hand, for smoke runs only.

Files have the real format but other content: images of Fashion-MNIST, and half-hourly electricity demand.
"""

from __future__ import annotations

import csv
import tempfile
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from hpc_oialr.data.fetch import CIFAR10_FILES, fetch
from hpc_oialr.data.image_arrays import FashionMNIST
from hpc_oialr.data.image_folder import require_pillow
from hpc_oialr.data.timeseries import read_series
from hpc_oialr.errors import DataError, UnknownNameError
from hpc_oialr.outputs import resolved

ETTM2_COLUMNS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")


def write_sample(name: str, folder: Path) -> Path:
    """Write a stand-in for a data set into ``folder``, unless it is there already; returns the folder.

    "imagenet": 160 JPEGs of 256 x 256 in ten class folders; "cifar-10": 384 images in its binary files; "ettm2": 8,063
    rows of seven columns, a quarter of an hour apart. DataError if the folder has other files, or if the source of the
    stand-in cannot be fetched.
    """
    writers = {"imagenet": _imagenet, "cifar-10": _cifar10, "ettm2": _ettm2}
    if name not in writers:
        raise UnknownNameError("sample", name, writers)
    note = f"A stand-in for {name}, made by `oialr data sample {name}` for smoke runs only: not the real data.\n"
    mark = folder / "SAMPLE.txt"
    if mark.is_file() and mark.read_text(encoding="utf-8") == note:
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "holds other files" if folder.is_dir() else "is a file"
        raise DataError(f"{folder} {what}. Name a new folder for the sample.")
    folder = resolved(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        writers[name](new)
        (new / mark.name).write_text(note, encoding="utf-8")
        new.replace(folder)
    return folder


def _imagenet(folder: Path) -> None:
    require_pillow()
    from PIL import Image

    images, labels = FashionMNIST.read(fetch("fashion-mnist"), training=False)
    for part, chosen in (("train", slice(0, 12)), ("val", slice(12, 16))):
        for label in range(10):
            target = folder / part / f"clothes_{label}"
            target.mkdir(parents=True)
            for i, pixels in enumerate(_resized(images[labels == label][chosen], 256).numpy()):
                Image.fromarray(pixels).convert("RGB").save(target / f"{i:02d}.JPEG", quality=85)


def _cifar10(folder: Path) -> None:
    images, labels = FashionMNIST.read(fetch("fashion-mnist"), training=False)
    planes = _resized(images[: 6 * 64], 32).flatten(1).repeat(1, 3)
    records = torch.cat((labels[: len(planes), None].to(torch.uint8), planes), dim=1)
    for name, part in zip(CIFAR10_FILES, records.chunk(6), strict=True):
        (folder / name).write_bytes(part.numpy().tobytes())


def _ettm2(folder: Path) -> None:
    [series], _ = read_series(fetch("taylor-30-min") / "taylor_30_min.csv", ("value",))[""]
    halves = np.array(series)
    # Half-hours and the means of neighbours: a value each quarter of an hour.
    demand = np.interp(np.arange(2 * len(halves) - 1) / 2, np.arange(len(halves)), halves)
    demand = (demand - demand.mean()) / demand.std()
    # A column for each lag of so many hours, in its own unit and at its own level.
    shifted = [np.roll(demand, 4 * 3 * lag) * (1 + lag) - 10 * lag for lag in range(len(ETTM2_COLUMNS))]
    with (folder / "ETTm2.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("date", *ETTM2_COLUMNS))
        for i, values in enumerate(zip(*shifted, strict=True)):
            time = datetime(2016, 7, 1) + timedelta(minutes=15 * i)
            rows.writerow((time.isoformat(sep=" "), *(f"{value:.6f}" for value in values)))


def _resized(images: Tensor, side: int) -> Tensor:
    """uint8 [N, side, side]."""
    pixels = interpolate(images.float(), size=(side, side), mode="bilinear", align_corners=False)
    return pixels.round().to(torch.uint8).squeeze(1)
