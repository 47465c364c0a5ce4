"""Small pictures and packages of them, made here: in the layouts that the pinned packages have."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

Colour = tuple[int, ...]


def picture(colour: Colour, size: tuple[int, int] = (64, 64), mode: str = "RGB", form: str = "PNG") -> bytes:
    """Return a picture of one colour, encoded."""
    sink = io.BytesIO()
    Image.new(mode, size, colour if len(colour) > 1 else colour[0]).save(sink, form)
    return sink.getvalue()


def noise() -> bytes:
    """Return a picture that no compression makes short."""
    sink = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(sink, "PNG")
    return sink.getvalue()


def blob(colour: Colour, seed: int) -> bytes:
    """Return a drawing: a disc of a colour on nothing, with the bits of `seed` as dark dots in it."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((4, 4, 59, 59), fill=(*colour, 255))
    ImageDraw.Draw(image).point([(20 + bit, 31) for bit in range(16) if seed >> bit & 1], fill=(1, 1, 1, 255))
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


CATEGORIES = {
    "Smileys & Emotion": ("face-smiling", (255, 220, 60)),
    "Animals & Nature": ("animal-bird", (120, 70, 30)),
    "Food & Drink": ("food-fruit", (220, 30, 40)),
    "Travel & Places": ("transport-ground", (40, 90, 220)),
    "Objects": ("tool", (128, 128, 128)),
}
CLOCKS = ("ONE OCLOCK", "THREE-THIRTY", "SIX OCLOCK", "TWELVE-THIRTY")
SIGNS = (
    "HASH KEY",
    *(f"KEYCAP {digit}" for digit in range(10)),
    "NEGATIVE SQUARED LATIN CAPITAL LETTER A",
    "SQUARED COOL",
)


def emoji_rows() -> list[dict[str, Any]]:
    """Return rows of emoji.json: twelve of each category, clocks, signs, a skin tone that is no drawing, a flag."""
    names = [(f"{kind} {number}", category, kind) for category, (kind, _) in CATEGORIES.items() for number in range(12)]
    names += [(f"CLOCK FACE {name}", "Travel & Places", "time") for name in CLOCKS]
    names += [(name, "Symbols", "keycap") for name in SIGNS]
    names += [("TYPE-3", "Component", "skin-tone"), ("Chad Flag", "Flags", "country-flag")]
    rows = []
    for number, (name, category, kind) in enumerate(names):
        code = f"{0x1F900 + number:X}"
        row = {
            "name": name.upper() if kind != "country-flag" else name,
            "unified": code,
            "image": f"{code.lower()}.png",
        }
        rows.append({**row, "category": category, "subcategory": kind, "has_img_google": True, "has_img_twitter": True})
    return rows


def emoji_package(path: Path, drawer: str, shift: int = 0, rows: list[dict[str, Any]] | None = None) -> Path:
    """Write a package of the emoji-datasource family; `shift` makes another hand's drawings."""
    given = emoji_rows() if rows is None else rows
    files = {"package/emoji.json": json.dumps(given).encode(), "package/img/sheet.png": b"not a picture"}
    for number, row in enumerate(given):
        colour = CATEGORIES.get(row["category"], ("", (150, 40, 180)))[1]
        files[f"package/img/{drawer}/64/{row['image']}"] = blob(colour, number + shift)
    return tar(path, files)


def tar(path: Path, files: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
