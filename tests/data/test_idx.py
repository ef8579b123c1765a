from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_oialr.data.fetch import FetchableDataset
from hpc_oialr.data.image_arrays import parse_idx
from hpc_oialr.errors import DataError


def packed(array: torch.Tensor) -> bytes:
    header = bytes([0, 0, 8, array.dim()]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.numpy().tobytes()


@settings(deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_reads_back_what_was_written(shape: list[int], seed: int) -> None:
    array = torch.randint(0, 256, tuple(shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(parse_idx(gzip.compress(packed(array))), array)


def test_checksum_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(b"right")
    right, wrong = hashlib.sha256(b"right").hexdigest(), hashlib.sha256(b"wrong").hexdigest()
    assert FetchableDataset("toy", {"x.gz": (wrong, right)}, ()).read(path) == b"right"
    other = FetchableDataset("toy", {"x.gz": (wrong,), "y.gz": (wrong,)}, ())
    with pytest.raises(DataError) as caught:
        other.read(path)
    assert str(caught.value).startswith(
        f"{path} is damaged: expected sha256 {wrong}, found {right}. Delete it and get it again. Run `oialr data"
    )
    with pytest.raises(DataError, match=r"cannot read .*y\.gz: No such file or directory\. Delete it and"):
        other.read(tmp_path / "y.gz")
