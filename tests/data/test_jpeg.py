from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.image_files import ramp

from hpc_oialr.data.image_folder import Box, View, _draft, read_view, require_pillow
from hpc_oialr.errors import MissingExtraError, SampleError


def expected(box: Box, size: int, *, mirrored: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Red along a row and green along a column of the ramp's view, if it were read without error."""
    left, top, right, bottom = box
    centres = (np.arange(size) + 0.5) / size
    red = 0.4 * (left + centres * (right - left) - 0.5)
    return red[::-1] if mirrored else red, 0.4 * (top + centres * (bottom - top) - 0.5)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(
    ("box", "size", "mirrored"),
    [
        ((0, 0, 600, 400), 20, False),  # a JPEG is decoded at 1/8
        ((120, 40, 440, 360), 64, True),  # at 1/4
        ((30.5, 20.5, 130.5, 110.5), 90, False),  # at full size
        ((200, 100, 220, 120), 60, False),  # enlarged
    ],
)
def test_views_show_what_they_should(tmp_path: Path, suffix: str, box: Box, size: int, mirrored: bool) -> None:
    path = tmp_path / f"ramp.{suffix}"
    ramp(600, 400).save(path, **({"quality": 98} if suffix == "jpg" else {}))
    seen = read_view(path, size, lambda width, height: View(box, mirrored)).double().numpy()
    red, green = expected(box, size, mirrored=mirrored)
    inner = slice(1, -1)  # at the image's own border there is nothing to go on from
    assert np.abs(seen[0] - red).max(axis=0)[inner].max() < 4
    assert np.abs(seen[1] - green[:, None]).max(axis=1)[inner].max() < 4


def test_a_jpeg_is_decoded_no_larger_than_needed(tmp_path: Path) -> None:
    ramp(600, 400).save(tmp_path / "ramp.jpg")
    with Image.open(tmp_path / "ramp.jpg") as image:
        assert _draft(image, (300, 200, 600, 400), 50) == (75, 50, 150, 100)
        assert image.size == (150, 100)


def test_other_colours_and_sizes_become_three_channels(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def whole(width: int, height: int) -> View:
        seen.append((width, height))
        return View((0, 0, width, height))

    for mode in ("L", "CMYK", "P", "RGBA"):
        path = tmp_path / f"{mode}.{'jpg' if mode in ('L', 'CMYK') else 'png'}"
        ramp(50, 40).convert(mode).save(path)
        assert read_view(path, 8, whole).shape == (3, 8, 8)
    assert seen == [(50, 40)] * 4


def test_damaged_files_are_named(tmp_path: Path) -> None:
    ramp(300, 200).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    for name, piece in (("cut.jpg", content[: len(content) // 2]), ("dust.jpg", b"dust"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(piece)
        with pytest.raises(SampleError) as caught:
            read_view(tmp_path / name, 8, lambda width, height: View((0, 0, width, height)))
        assert str(caught.value).startswith(f"{tmp_path / name} cannot be read as an image: ")
        assert "Copy it again from its source" in str(caught.value)
    with pytest.raises(SampleError, match="No such file"):
        read_view(tmp_path / "none.jpg", 8, lambda width, height: View((0, 0, width, height)))


def test_missing_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError) as caught:
        require_pillow()
    assert str(caught.value) == ("reading image files needs Pillow. Install it with: pip install 'hpc_oialr[images]'")
