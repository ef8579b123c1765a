"""HDF5 files that live in memory, made from bytes and turned into bytes."""

from __future__ import annotations

import itertools

import h5py

_NUMBERS = itertools.count()
_GROWTH = 1 << 16


def memory_file(content: bytes | None = None, *, writable: bool = False) -> h5py.File:
    """An HDF5 file without a path: an empty one, or a copy of ``content``.

    No lock is taken, and nothing that happens to the file it was read from, also on a network file system, can
    disturb it any more.

    Raises
    ------
    OSError
        If ``content`` is no HDF5 file.
    """
    # HDF5 tells open files apart by their names.
    name = b"memory %d" % next(_NUMBERS)
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fapl_core(block_size=_GROWTH, backing_store=False)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    if content is None:
        return h5py.File(h5py.h5f.create(name, h5py.h5f.ACC_TRUNC, fapl=access))
    access.set_file_image(content)
    mode = h5py.h5f.ACC_RDWR if writable else h5py.h5f.ACC_RDONLY
    return h5py.File(h5py.h5f.open(name, mode, fapl=access))


def content_of(file: h5py.File) -> bytes:
    """The whole file as it would be on a disk if it were closed now; it stays open."""
    file.flush()
    return bytes(file.id.get_file_image())
