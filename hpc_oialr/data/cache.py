"""Where fetched data lie. The only module of the data layer that reads the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from hpc_oialr.errors import DataError


def cache_root(environ: Mapping[str, str] = os.environ) -> Path:
    """``OIALR_DATA`` if it is set, else ``hpc_oialr`` in the user's cache (``XDG_CACHE_HOME``, ``~/.cache``).

    Raises
    ------
    DataError
        If neither is set and the user has no home.

    Examples
    --------
    >>> str(cache_root({"OIALR_DATA": "/scratch/data"}))
    '/scratch/data'
    >>> str(cache_root({"XDG_CACHE_HOME": "/home/me/.cache"}))
    '/home/me/.cache/hpc_oialr'
    """
    if own := environ.get("OIALR_DATA"):
        return Path(own)
    shared = environ.get("XDG_CACHE_HOME")
    try:
        return (Path(shared) if shared else Path.home() / ".cache") / "hpc_oialr"
    except RuntimeError:
        raise DataError(
            "there is no folder for data: HOME is not set, and this user has no entry that names one. Set "
            "OIALR_DATA to a folder."
        ) from None
