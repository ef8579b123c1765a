"""HDF5 files that live in memory, made from bytes and turned into bytes."""

from __future__ import annotations

import functools
import io
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
    if not content:
        raise OSError("it is empty")
    access.set_file_image(content)
    mode = h5py.h5f.ACC_RDWR if writable else h5py.h5f.ACC_RDONLY
    return h5py.File(h5py.h5f.open(name, mode, fapl=access))


class Image:
    """A file in memory that is changed again and again, and whose bytes are asked for after each change.

    Attributes
    ----------
    file
        The file; another object after :meth:`content`, with some versions of HDF5.
    opened
        Data sets that are kept open, by name: to open them takes longer than to add a row.

    Parameters
    ----------
    content
        What to begin with; default an empty file.
    """

    def __init__(self, content: bytes = b"") -> None:
        self._open(content)

    def _open(self, content: bytes) -> None:
        self.opened: dict[str, h5py.Dataset] = {}
        self._bytes = io.BytesIO(content)
        if images_are_whole():
            self.file = memory_file(content or None, writable=True)
        else:
            self.file = h5py.File(self._bytes, "a", libver="v110")

    def content(self) -> bytes:
        """The whole file as it would be on a disk if it were closed now."""
        if images_are_whole():
            return _image(self.file)
        self.close()
        self._open(self._bytes.getvalue())
        return self._bytes.getvalue()

    def close(self) -> None:
        """Let go of the file."""
        self.opened.clear()
        self.file.close()


def _image(file: h5py.File) -> bytes:
    file.flush()
    return bytes(file.id.get_file_image())


@functools.cache
def images_are_whole() -> bool:
    """Whether HDF5's image of an open file can be opened; that of 1.10 has a wrong checksum."""
    file = memory_file()
    image = _image(file)
    file.close()
    try:
        memory_file(image).close()
    except OSError:
        return False
    return True
