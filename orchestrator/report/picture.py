"""A matrix as one small picture (PNG) inside a figure: thousands of squares in a few kilobytes."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from html import escape

WARM, COLD = (209, 73, 91), (42, 120, 194)  # --warm and --cold of the light page: both show on a dark one
LEAST, MOST = 0.04, 0.95  # opacity of the least and the greatest value


def squares(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[int, int], float],
    *,
    centre: float | None,
    reach: float,
    box: tuple[float, float, float, float],
) -> str:
    """Return `values` (row, column) as an `<image>` at `box` (x, y, width, height); missing ones are transparent.

    With a `centre` values above and below it have colours of their own, darkest `reach` away from it.
    """
    low, high = min(values.values()), max(values.values())
    lines = []
    for r in range(len(rows)):
        line = bytearray(b"\0")
        for c in range(len(columns)):
            value = values.get((r, c))
            if value is None:
                line += b"\0\0\0\0"
                continue
            share = min(1.0, abs(value - centre) / reach) if centre is not None else (value - low) / ((high - low) or 1)
            colour = COLD if centre is not None and value < centre else WARM
            line += bytes((*colour, max(1, round(255 * (LEAST + (MOST - LEAST) * share)))))
        lines.append(bytes(line))
    picture = base64.b64encode(_png(len(columns), len(rows), b"".join(lines))).decode()
    told = {
        "rows": len(rows),
        "columns": len(columns),
        "low": round(low, 6),
        "high": round(high, 6),
        "centre": centre,
        "reach": round(reach, 6),
        "names": [None if _numbered(names) else list(names) for names in (rows, columns)],
        "least": LEAST,
        "most": MOST,
    }
    x, y, width, height = box
    return (
        f'<image x="{x}" y="{y}" width="{width}" height="{height}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" data-map="{escape(json.dumps(told, separators=(",", ":")))}" '
        f'href="data:image/png;base64,{picture}"/>'
    )


def _numbered(names: Sequence[str]) -> bool:
    return all(name == str(i) for i, name in enumerate(names))


def _png(width: int, height: int, body: bytes) -> bytes:
    """Return a PNG of 8-bit RGBA from its lines, each with its filter byte."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(body, 9)) + chunk(b"IEND", b"")
