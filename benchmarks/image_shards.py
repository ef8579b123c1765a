"""Random reads of encoded images from tar shards and from HDF5, and the shards' reader beside the decoder alone.

    python -m benchmarks.image_shards --data cifar10-jpeg-train.tar.xz --out benchmarks/results/image_shards.json

"small" images are CIFAR-10's JPEGs, "large" ones mosaics of them of 480 x 352 pixels, about 50 kB. One
process reads in a new random order each round, all ways in turn; rates are medians over the rounds. Files are in the
page cache, so that the formats are compared, not the disk. "decode" is the decoder on bytes that are in memory; "reader"
makes whole batches, as training gets them.
"""

from __future__ import annotations

import io
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.common import Row, arguments, finish
from hpc_oialr.data import ImageShards, pack
from hpc_oialr.data.base import CounterRNG
from hpc_oialr.data.image_folder import read_view
from hpc_oialr.data.image_shards import StoredFiles
from hpc_oialr.data.image_sources import LABEL, read_place

ACROSS, DOWN = 15, 11
COUNTS = {"small": 8_000, "large": 500}
BATCH = 100


def write_images(data: Path, folder: Path) -> None:
    """Both kinds as folders of JPEGs."""
    with tarfile.open(data) as archive:
        small = [archive.extractfile(member).read() for member in archive if member.name.endswith(".jpg")]  # type: ignore[union-attr]
    rng = np.random.default_rng(0)
    small = [small[i] for i in rng.permutation(len(small))[: COUNTS["small"]]]
    pixels = np.stack([np.array(Image.open(io.BytesIO(content)).convert("RGB")) for content in small])
    for name, count in COUNTS.items():
        target = folder / name / "train" / "all"
        target.mkdir(parents=True)
        for i in range(count):
            if name == "small":
                (target / f"{i:05d}.jpg").write_bytes(small[i])
                continue
            chosen = pixels[rng.integers(0, len(pixels), ACROSS * DOWN)].reshape(DOWN, ACROSS, 32, 32, 3)
            whole = chosen.transpose(0, 2, 1, 3, 4).reshape(DOWN * 32, ACROSS * 32, 3)
            Image.fromarray(np.ascontiguousarray(whole)).save(target / f"{i:05d}.jpg", quality=75)


def write_hdf5(contents: list[bytes], path: Path) -> None:
    """All bytes in one data set, and where each image begins."""
    with h5py.File(path, "w") as file:
        file["bytes"] = np.frombuffer(b"".join(contents), np.uint8)
        file["ends"] = np.cumsum([len(content) for content in contents])


def measure(name: str, folder: Path, rounds: int) -> Row:
    """Images per second of each way to get them, in random order."""
    count, size = COUNTS[name], 32 if name == "small" else 224
    pack([folder / name], folder / f"{name}-shards", per_shard=count // 4)
    train = ImageShards(path=str(folder / f"{name}-shards"), size=size).build().train
    assert isinstance(train, StoredFiles)
    contents = [read_place(train.files, place) for place in train.table]
    write_hdf5(contents, folder / f"{name}.h5")
    labels, augment = torch.from_numpy(np.array(train.table[:, LABEL])), train.augment
    assert augment is not None
    with h5py.File(folder / f"{name}.h5") as file:
        stored, ends = file["bytes"], np.concatenate([[0], file["ends"][:]])

        def hdf5(i: int) -> bytes:
            return stored[ends[i] : ends[i + 1]].tobytes()  # type: ignore[no-any-return]

        def tar(i: int) -> bytes:
            return read_place(train.files, train.table[i])

        def decode(content: Callable[[int], bytes], order: Tensor, rng: CounterRNG) -> None:
            for start in range(0, count, BATCH):
                indices = order[start : start + BATCH]
                for i, row in zip(indices.tolist(), augment.numbers(indices, rng), strict=True):
                    read_view(io.BytesIO(content(i)), size, lambda w, h, row=row: augment.view(w, h, row))

        def gather(order: Tensor, rng: CounterRNG) -> None:
            for start in range(0, count, BATCH):
                train.gather(order[start : start + BATCH], rng)

        assert all(hdf5(i) == tar(i) == contents[i] for i in range(0, count, 97))
        ways: dict[str, Callable[[Tensor, CounterRNG], object]] = {
            "tar, read": lambda order, rng: [tar(i) for i in order.tolist()],
            "HDF5, read": lambda order, rng: [hdf5(i) for i in order.tolist()],
            "decode": lambda order, rng: decode(contents.__getitem__, order, rng),
            "tar, read and decode": lambda order, rng: decode(tar, order, rng),
            "HDF5, read and decode": lambda order, rng: decode(hdf5, order, rng),
            "reader, whole batches": gather,
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            rng = CounterRNG(0, number)
            for way, call in ways.items():
                start = time.process_time()
                call(rng.permutation(count), rng)
                if number:
                    times[way].append(time.process_time() - start)
    rates = {f"{way} (1/s)": count / statistics.median(seconds) for way, seconds in times.items()}
    ratio = {
        f"{way} / decode": statistics.median(d / t for d, t in zip(times["decode"], times[way], strict=True))
        for way in list(ways)[3:]
    }
    mean = sum(map(len, contents)) / count
    return (
        {"images": name, "count": len(labels), "mean_bytes": mean, "decoded_side": size, "rounds": rounds}
        | rates
        | ratio
    )


def main() -> None:
    """Measure both kinds."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--data", type=Path, required=True, metavar="TAR", help="CIFAR-10's training images as JPEGs")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        write_images(options.data, Path(scratch))
        rows = [measure(name, Path(scratch), options.rounds) for name in COUNTS]
    finish(rows, options.out)


if __name__ == "__main__":
    main()
