"""The colour of a drawing, where most of what is drawn has one: counted pixel by pixel."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from orchestrator.catalog.pictures import COLOURS

# A drawing has a colour when so much of it is of it.
DOMINANT = 0.6
# Hue in degrees up to which a saturated pixel is called so; what lies between magenta and red has no name here.
_HUES = ((15, "red"), (42, "orange"), (68, "yellow"), (165, "green"), (255, "blue"), (300, "purple"), (345, ""))
_BROWN = (10, 45, 0.75)  # from, to, and darker than: dark orange
_GREY = 0.15  # less saturated than this
_DARK, _LIGHT = 0.3, 0.85


def colour_of(image: bytes) -> str:
    """Return the colour that at least DOMINANT of the opaque pixels of a picture have, "" when none has."""
    from PIL import Image

    with Image.open(io.BytesIO(image), formats=("PNG",)) as picture:
        rgba = np.asarray(picture.convert("RGBA"))
    drawn = rgba[rgba[..., 3] >= 128][:, :3]
    if not len(drawn):
        return ""
    counts = np.bincount(named(drawn), minlength=len(COLOURS) + 1)[: len(COLOURS)]
    best = int(counts.argmax())
    return COLOURS[best] if counts[best] >= DOMINANT * len(drawn) else ""


def named(rgb: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return for each pixel [N, 3] the index of its colour in COLOURS, len(COLOURS) where it has no name. [N]"""
    values = rgb.astype(np.float64) / 255
    high, low = values.max(1), values.min(1)
    spread = high - low
    saturation = np.where(high > 0, spread / np.maximum(high, 1e-12), 0.0)
    red, green, blue = values.T
    safe = np.maximum(spread, 1e-12)
    sector = np.where(
        high == red,
        ((green - blue) / safe) % 6,
        np.where(high == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = sector * 60
    found = np.full(len(rgb), COLOURS.index("red"), np.int64)  # from 345 degrees on
    for limit, name in reversed(_HUES):
        found[hue < limit] = COLOURS.index(name) if name else len(COLOURS)
    start, stop, dark = _BROWN
    found[(hue >= start) & (hue < stop) & (high < dark)] = COLOURS.index("brown")
    plain = saturation < _GREY
    found[plain] = COLOURS.index("grey")
    found[plain & (high >= _LIGHT)] = COLOURS.index("white")
    found[high < _DARK] = COLOURS.index("black")
    return found
