"""Pictures composed of drawings on a white canvas of two by two cells, so that number and place are known exactly."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

from jobs.data.images import WHITE, encoded, pixels

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

# A cell is as large as an emoji is drawn, so that these are placed as they are, pixel by pixel.
CELL = 64
COLUMNS = 2


def composed(placed: Mapping[int, bytes]) -> bytes:
    """Return a PNG of 128 x 128 pixels with an encoded picture in each cell: 0 1 above, 2 3 below.

    A picture of another size is put whole into its cell, in the middle.
    """
    from PIL import Image

    canvas = Image.new("RGB", (CELL * COLUMNS, CELL * COLUMNS), WHITE)
    for cell, data in placed.items():
        canvas.paste(_cell(data), (cell % COLUMNS * CELL, cell // COLUMNS * CELL))
    return encoded(canvas)


@lru_cache(maxsize=4096)
def _cell(data: bytes) -> Picture:
    from PIL import Image

    return Image.fromarray(pixels(data, CELL, "a drawing"))
