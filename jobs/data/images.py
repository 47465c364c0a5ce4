"""Pictures in data and items: PNG and JPEG, decoded by Pillow within bounds, told by the sha256 of their bytes.

A data artifact holds each picture once, as it came: `images.parquet` with the columns `digest` (sha256 of the encoded
bytes, hexadecimal) and `image` (these bytes), ordered by digest. Rows name their pictures by digest, so that what a
frozen encoder makes of one is made once, however many questions are asked about it.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from jobs.data.whole_tables import whole_rows
from orchestrator.errors import SourceError

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# Bounds of one picture: as it is stored, and as it is decoded (a few kilobytes can claim billions of pixels).
PICTURE_BYTES = 32 * 2**20
PICTURE_PIXELS = 2**25
FORMATS = ("PNG", "JPEG")
BLOB = "images.parquet"
WHITE = (255, 255, 255)


def digest_of(data: bytes) -> str:
    """Return the name of an encoded picture: its sha256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def opened(data: bytes, where: str) -> Picture:
    """Return the decoded picture in RGB, upright, transparent parts on white; SourceError that names `where`.

    Grey, palette and one-bit pictures become RGB, 16 bits of grey 8. Print colours (CMYK) have no RGB of their own
    without a profile, and 32-bit grey no range: both are refused.
    """
    require_pillow(where)
    from PIL import Image, UnidentifiedImageError

    if len(data) > PICTURE_BYTES:
        cause = f"{len(data) / 2**20:.0f} MiB, at most {PICTURE_BYTES / 2**20:g} are read"
        raise SourceError(f"{where}: its picture is too large", cause=cause, hint="store it smaller")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the bound below is ours
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _within_bounds(image, where)
            image.load()
    except Image.DecompressionBombError:
        raise _too_many(where, "more pixels than any picture has") from None
    except UnidentifiedImageError:
        cause = f"{len(data)} bytes that begin {data[:8]!r}"
        hint = "save it as PNG or JPEG, whole" if data else "give the row a picture, or leave it out"
        raise SourceError(f"{where}: its picture is no PNG or JPEG", cause=cause, hint=hint) from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:  # what Pillow raises for damaged files
        said = f"{type(error).__name__}: {error}".split("\n")[0]
        hint = "fetch or write it again, or leave the row out"
        raise SourceError(f"{where}: its picture is damaged or truncated", cause=said, hint=hint) from None
    return _in_rgb(image, where)


def pixels(data: bytes, size: int, where: str = "a picture") -> NDArray[np.uint8]:
    """Return a picture as uint8 [size, size, 3], RGB: the whole of it, in the middle of a white square, bicubic.

    SourceError as `opened` raises it.
    """
    from PIL import Image

    image = opened(data, where)
    scale = size / max(image.size)
    shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    if shape != image.size:
        image = image.resize(shape, Image.Resampling.BICUBIC)
    square = Image.new("RGB", (size, size), WHITE)
    square.paste(image, ((size - shape[0]) // 2, (size - shape[1]) // 2))
    return np.asarray(square, dtype=np.uint8)


def encoded(image: Picture) -> bytes:
    """Return a picture as PNG: the same bytes for the same pixels on every machine with this Pillow."""
    sink = io.BytesIO()
    image.save(sink, format="PNG", optimize=False, compress_level=6)
    return sink.getvalue()


def image_table(images: Mapping[str, bytes]) -> bytes:
    """Return the blob of pictures by digest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = sorted(images)
    columns = {
        "digest": pa.array(names, pa.string()),
        "image": pa.array([images[name] for name in names], pa.large_binary()),
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink, compression="none", store_schema=False, row_group_size=1024)
    return sink.getvalue()


def load_images(path: Path | BinaryIO) -> dict[str, bytes]:
    """Return the encoded pictures of a data artifact's `images.parquet` by digest."""
    return {row["digest"]: row["image"] for row in whole_rows(path, "digest", "image")}


def require_pillow(where: str) -> None:
    """Raise SourceError, with what to install, where Pillow is missing."""
    try:
        importlib.import_module("PIL.Image")
    except ImportError:
        raise SourceError(
            f"{where} has pictures, and Pillow is not installed here",
            cause="it decodes them",
            hint="pip install 'moegrid[vision]' where jobs run",
        ) from None


def _within_bounds(image: Picture, where: str) -> None:
    width, height = image.size
    if width * height > PICTURE_PIXELS:
        raise _too_many(where, f"{width} x {height}")


def _too_many(where: str, size: str) -> SourceError:
    return SourceError(
        f"{where}: its picture has too many pixels",
        cause=f"{size}, at most {PICTURE_PIXELS / 1e6:.0f} million are decoded",
        hint="store it smaller",
    )


def _in_rgb(image: Picture, where: str) -> Picture:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        whole = image.convert("RGBA")
        ground = Image.new("RGBA", whole.size, (*WHITE, 255))
        return Image.alpha_composite(ground, whole).convert("RGB")
    if image.mode in ("RGB", "L", "P", "1"):
        return image.convert("RGB")
    raise SourceError(
        f"{where}: its picture is of the mode {image.mode}",
        cause="RGB, grey (8 or 16 bits), palette and one-bit pictures are read, with or without transparency",
        hint="save it as RGB",
    )
