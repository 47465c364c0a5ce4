"""Pictures as they are decoded: what a mode means, what is refused, where they go in a square."""

from __future__ import annotations

import io
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from jobs.data import images
from jobs.data.images import digest_of, image_table, load_images, opened, pixels
from orchestrator.errors import SourceError
from tests.picture_samples import picture


def png(width: int, height: int, depth: int, kind: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG that is written by hand, so that what it means does not depend on Pillow."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    body = b"".join(chunk(*one) for one in ((b"IHDR", head), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + body


PALETTE = bytes([10, 20, 30, 200, 100, 50])
# name -> (picture of two pixels, what they are in RGB): computed from the format's definition.
MEANINGS = {
    "rgb": (png(2, 1, 8, 2, bytes([0, 10, 20, 30, 40, 50, 60])), [[10, 20, 30], [40, 50, 60]]),
    "grey": (png(2, 1, 8, 0, bytes([0, 7, 200])), [[7] * 3, [200] * 3]),
    "one bit": (png(2, 1, 1, 0, bytes([0, 0b01000000])), [[0] * 3, [255] * 3]),
    "palette": (png(2, 1, 8, 3, bytes([0, 1, 0]), (b"PLTE", PALETTE)), [[200, 100, 50], [10, 20, 30]]),
    "palette with a hole": (
        png(2, 1, 8, 3, bytes([0, 1, 0]), (b"PLTE", PALETTE), (b"tRNS", bytes([0, 255]))),
        [[200, 100, 50], [255, 255, 255]],
    ),
    "half transparent": (png(2, 1, 8, 6, bytes([0, 0, 0, 0, 0, 100, 0, 0, 255])), [[255] * 3, [100, 0, 0]]),
    "grey with alpha": (png(2, 1, 8, 4, bytes([0, 9, 255, 9, 0])), [[9] * 3, [255] * 3]),
    "grey of 16 bits": (
        png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 65535, 32768)),
        [[255] * 3, [round(32768 / 65535 * 255)] * 3],
    ),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_every_mode_becomes_what_it_shows_on_white(name):
    data, expected = MEANINGS[name]
    assert np.asarray(opened(data, "here")).tolist() == [expected]


def test_half_of_a_colour_lies_half_on_white():
    (pixel,) = np.asarray(opened(png(1, 1, 8, 6, bytes([0, 0, 100, 255, 51])), "here"))[0]
    assert np.abs(pixel - np.array([204, 224, 255])).max() <= 1, "a fifth of it and four fifths of white"


def test_a_photograph_stands_upright():
    left_red = Image.new("RGB", (64, 32), (0, 0, 255))
    left_red.paste((255, 0, 0), (0, 0, 32, 32))
    sink = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: what is left is above
    left_red.save(sink, "JPEG", exif=exif, quality=95)
    upright = np.asarray(opened(sink.getvalue(), "here")).astype(int)
    assert upright.shape == (64, 32, 3)
    assert upright[8, 16, 0] > 200 > 50 > upright[8, 16, 2]
    assert upright[56, 16, 2] > 200 > 50 > upright[56, 16, 0]


def test_a_picture_lies_whole_in_the_middle_of_a_white_square():
    found = pixels(picture((200, 0, 0), (40, 20)), 8)
    assert found.shape == (8, 8, 3)
    assert found.dtype == np.uint8
    assert (found[:2] == 255).all()
    assert (found[6:] == 255).all()
    assert (found[2:6] == (200, 0, 0)).all()
    as_it_is = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(as_it_is).save(sink, "PNG")
    assert (pixels(sink.getvalue(), 8) == as_it_is).all()
    assert pixels(picture((0, 0, 0), (1, 500)), 8).shape == (8, 8, 3)


BOMB = png(100_000, 100_000, 1, 0, b"\0")


@pytest.mark.parametrize(
    "data, message",
    [
        (BOMB, "too many pixels"),
        (png(6000, 6000, 8, 0, b"\0"), "too many pixels"),
        (picture((1, 2, 3))[:-30], "damaged or truncated"),
        (picture((9, 9, 9), (300, 300), form="JPEG")[:400], "damaged or truncated"),
        (b"", "no PNG or JPEG"),
        (b"GIF89a" + bytes(40), "no PNG or JPEG"),
        (picture((1,), (3, 3), "P", "GIF"), "no PNG or JPEG"),
        (b"<html>not found</html>", "no PNG or JPEG"),
        (picture((1, 2, 3, 4), mode="CMYK", form="JPEG"), "is of the mode CMYK"),
        (MEANINGS["rgb"][0].replace(b"IDAT", b"IDAX"), "no PNG or JPEG|damaged or truncated"),
    ],
)
def test_what_cannot_be_decoded_is_told_with_its_row(data, message):
    with pytest.raises(SourceError, match=f"row 7: its picture.*{message}") as caught:
        opened(data, "row 7")
    assert caught.value.hint


def test_a_file_beyond_the_bound_is_not_even_opened(monkeypatch):
    monkeypatch.setattr(images, "PICTURE_BYTES", 50)
    with pytest.raises(SourceError, match="row 7: its picture is too large"):
        opened(picture((1, 2, 3)), "row 7")


def test_without_pillow_the_extra_is_named(monkeypatch):
    data = picture((1, 2, 3))
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(SourceError, match="Pillow is not installed") as caught:
        opened(data, "rows.jsonl:1")
    assert "moegrid[vision]" in caught.value.hint


def test_pictures_are_kept_by_digest_as_they_came(tmp_path):
    given = {digest_of(data): data for data in (picture((1, 2, 3)), picture((4, 5, 6), form="JPEG"))}
    (tmp_path / "images.parquet").write_bytes(image_table(given))
    found = load_images(tmp_path / "images.parquet")
    assert found == given
    assert [*found] == sorted(given)
    assert image_table(given) == image_table(dict(reversed(given.items())))
