"""Fetch a data set once into the cache, from the first source that has it."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from hpc_oialr.data.cache import cache_root
from hpc_oialr.data.catalog import FetchableDataset, describe
from hpc_oialr.data.sources import SourceError
from hpc_oialr.errors import DataError
from hpc_oialr.outputs import require_absent

logger = logging.getLogger(__name__)


def fetch(name: str, data_dir: str | Path | None = None, *, force: bool = False) -> Path:
    """Make sure that a data set lies on this machine, unharmed.

    Parameters
    ----------
    name
        See :func:`hpc_oialr.data.fetchable`.
    data_dir
        Folder that holds the files already, or in which a folder ``name`` is made for them; the cache
        if not given.
    force
        Replace damaged files in a ``data_dir`` too; those in the cache always are.

    Returns
    -------
    Path
        The folder of the files.

    Raises
    ------
    UnknownNameError
        No such data set; lists the valid ones.
    DataError
        No source could deliver; lists what was tried and what to do.
    OutputError
        If files of these names with other content are in ``data_dir``.
    """
    dataset = describe(name)
    if data_dir is not None and dataset.known and dataset.fault(Path(data_dir)) is None:
        logger.info("%s: already in %s, checked", name, data_dir)
        return Path(data_dir)
    if data_dir is None:
        return fetch_into(dataset, cache_root())
    return fetch_into(dataset, Path(data_dir), replace=force)


def fetch_into(dataset: FetchableDataset, root: Path, *, replace: bool = True) -> Path:
    """Fetch into ``root/name``: tried in a temporary folder, checked, then renamed file by file.

    Other files there stay; without ``replace``, damaged ones of the same names are an error.
    """
    target = root / dataset.name
    fault = dataset.fault(target)
    if fault is None:
        logger.info("%s: already in %s, checked", dataset.name, target)
        return target
    if target.exists():
        if not replace:
            require_absent(target, [*dataset.files, *dataset.sizes], f"fetching {dataset.name}")
        logger.warning("%s: %s; fetched again", dataset.name, fault)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"cannot write to {root}: {error.strerror}. Name another folder, or set OIALR_DATA."
        ) from error
    tried = []
    for source in dataset.sources:
        logger.info("%s: trying %s", dataset.name, source.title)
        # Beside the target, so that a rename puts the files in place.
        with tempfile.TemporaryDirectory(prefix=f".{dataset.name}-", dir=root) as parent:
            scratch = Path(parent) / "new"
            scratch.mkdir()
            try:
                source.fill(scratch)
                reason = dataset.fault(scratch)
            except (SourceError, OSError) as error:
                reason = str(error)
            if reason is None:
                _put_in_place(dataset, scratch, target)
                logger.info("%s: fetched from %s into %s, checked", dataset.name, source.title, target)
                return target
        logger.info("%s: %s: %s", dataset.name, source.title, reason)
        tried.append(f"{source.title}: {reason}")
    raise DataError(
        f"{dataset.name} could not be fetched into {target}. Tried {'; '.join(tried)}. {dataset.fix}"
    )


def _put_in_place(dataset: FetchableDataset, new: Path, target: Path) -> None:
    """Rename, file by file where the folder exists: what else lies there stays."""
    if not target.exists():
        try:
            new.replace(target)
            return
        except OSError:
            # Another process may have put its own copy there meanwhile; then that one serves.
            if dataset.fault(target) is None:
                return
            raise
    for file in (each for each in sorted(new.rglob("*")) if each.is_file()):
        place = target / file.relative_to(new)
        place.parent.mkdir(parents=True, exist_ok=True)
        file.replace(place)
