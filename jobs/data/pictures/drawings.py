"""Pictures with names and groups in the pinned packages: emoji of two drawers, stamps of Tux Paint, clip art."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from jobs.data.archives import files_of
from jobs.data.fetching import fetch
from jobs.data.images import opened
from orchestrator.catalog.pins import Package
from orchestrator.errors import SourceError

log = logging.getLogger(__name__)

# Of a held-out source, at most so many pictures: in an order that does not depend on the archive's.
MOST_HELD_OUT = 1000
# Clip art is 150 MB unpacked: so much of it is read.
_CLIP_ART_SHARE = 0.6
# A caption of more words is a story; what follows these marks explains a name.
NAME_WORDS = 4
_EXPLAINED = re.compile(r"[.!] |[(,;:]| ?[\u2013\u2014]")
# Share of the identities that questions are trained on; the others are never seen in training, whoever draws them.
TRAINED_SHARE = 0.7

_EMOJI_GROUPS = {
    "Smileys & Emotion": "face",
    "People & Body": "person",
    "Animals & Nature": "animal or plant",
    "Food & Drink": "food",
    "Travel & Places": "place or vehicle",
    "Activities": "activity",
    "Objects": "object",
    "Symbols": "symbol",
}
# Code points that change a drawing's skin, sex or style, not what it shows; joiners.
_STYLES = frozenset(("FE0F", "200D", "2640", "2642", "1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"))
_PERSON, _MAN_WOMAN, _RIGHT = "1F9D1", ("1F468", "1F469"), "27A1"

_STAMPS, _CLIP_ART = "usr/share/tuxpaint/stamps/", "usr/share/openclipart/png/"
# Folders whose content is of one of the groups throughout.
_STAMP_GROUPS = {
    "animals": "animal or plant",
    "plants": "animal or plant",
    "food": "food",
    "vehicles": "place or vehicle",
    "town/houses": "place or vehicle",
    "town/monuments": "place or vehicle",
    "sports": "activity",
    "hobbies/music": "object",
    "household": "object",
    "clothes": "object",
    "medical": "object",
    "symbols/alphabets": "symbol",
    "symbols/math": "symbol",
    "symbols/music": "symbol",
}
_CLIP_ART_GROUPS = {
    "animals": "animal or plant",
    "plants": "animal or plant",
    "food": "food",
    "people": "person",
    "buildings": "place or vehicle",
    "transportation": "place or vehicle",
    "containers": "object",
    "electronics": "object",
    "office": "object",
    "tools": "object",
    "recreation": "activity",
    "signs_and_symbols": "symbol",
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """One picture and what its package says of it.

    `identity` is what it shows, whoever drew it; `name` in words ("" where the package has none); `group` one of
    GROUPS ("" for none of them), `kind` the finer group that the package has. `code` is an emoji's code point.
    """

    identity: str
    name: str
    group: str
    kind: str
    image: bytes
    code: str = ""

    @property
    def trained(self) -> bool:
        """Whether questions about it may be trained on: the same for one identity in every package, for ever."""
        return share_of(f"split/{self.identity}") < TRAINED_SHARE


def share_of(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / 2**48


def drawings_of(package: Package) -> list[Drawing]:
    """Return the pictures of a pinned package, in the order of their identities. SourceError when it is not as pinned.

    Two drawings of one identity differ in skin, sex or direction.
    """
    path = fetch(package)
    if package.scheme == "npm":
        return emoji(path, package.name.rpartition("-")[2])
    if package.name == "openclipart-png":
        return clip_art(path)
    return stamps(path)


def identity_of(code: str) -> str:
    """Return what an emoji shows, of its code points `1F3C3-1F3FB-200D-2640-FE0F`: without skin, sex and direction."""
    points = [_PERSON if point in _MAN_WOMAN else point for point in code.split("-") if point not in _STYLES]
    if len(points) > 1 and points[-1] == _RIGHT:
        points.pop()
    return "-".join(points) or code


def emoji(path: Path, drawer: str) -> list[Drawing]:
    """Return the emoji of a package of the emoji-datasource family, one picture each, as `drawer` draws them."""
    folder, table = f"package/img/{drawer}/64/", "package/emoji.json"
    files = dict(files_of(path, lambda name: name == table or name.startswith(folder)))
    if table not in files:
        raise SourceError(f"{path} has no {table}", hint="this is not the pinned package: delete it")
    found = []
    for row in json.loads(files[table]):
        image = files.get(f"{folder}{row['image']}")
        if image is None or not row[f"has_img_{drawer}"] or row["category"] == "Component":
            continue
        group, code = _EMOJI_GROUPS.get(row["category"], ""), row["unified"]
        found.append(Drawing(identity_of(code), str(row["name"]).lower(), group, row["subcategory"], image, code))
    return sorted(found, key=lambda drawing: (drawing.identity, drawing.code))


def stamps(path: Path) -> list[Drawing]:
    """Return Tux Paint's stamps, but for cartoons, whose captions name them: up to NAME_WORDS words, without more."""
    files = dict(files_of(path, lambda name: name.startswith(_STAMPS) and name.endswith((".png", ".txt"))))
    found = []
    for name, image in files.items():
        below = name.removeprefix(_STAMPS)
        caption = files.get(f"{name.removesuffix('.png')}.txt", b"").decode("utf-8", "replace").partition("\n")[0]
        words = _EXPLAINED.split(caption, maxsplit=1)[0].strip().rstrip(".!").lower()
        words = words.removeprefix("a ").removeprefix("an ").removeprefix("the ")
        named = 0 < len(words.split()) <= NAME_WORDS
        if not name.endswith(".png") or "cartoon" in below or not named:
            continue
        group = _folder_group(below, _STAMP_GROUPS)
        found.append(Drawing(f"stamp/{below}", words, group, below.rpartition("/")[0], image))
    return _some(found)


def clip_art(path: Path) -> list[Drawing]:
    """Return clip art of the folders that are of one group, without names: its file names hold those of authors."""
    wanted = tuple(f"{_CLIP_ART}{folder}/" for folder in _CLIP_ART_GROUPS)

    def chosen(name: str) -> bool:
        return name.startswith(wanted) and name.endswith(".png") and share_of(f"drawn/clipart/{name}") < _CLIP_ART_SHARE

    found = []
    for name, image in files_of(path, chosen):
        below = name.removeprefix(_CLIP_ART)
        group = _folder_group(below, _CLIP_ART_GROUPS)
        found.append(Drawing(f"clipart/{below}", "", group, below.rpartition("/")[0], image))
    return _some(found)


def _folder_group(below: str, groups: Mapping[str, str]) -> str:
    folders = PurePosixPath(below).parent.parts
    return next((groups[key] for n in (2, 1) if (key := "/".join(folders[:n])) in groups), "")


def _some(drawings: Iterable[Drawing]) -> list[Drawing]:
    """Return what can be decoded of a held-out source, at most MOST_HELD_OUT, by identity."""
    kept: list[Drawing] = []
    left_out = 0
    for drawing in sorted(drawings, key=lambda drawing: share_of(f"drawn/{drawing.identity}")):
        try:
            opened(drawing.image, drawing.identity)
        except SourceError as error:
            log.info("%s is left out: %s", drawing.identity, error.cause or error.error)
            left_out += 1
            continue
        kept.append(drawing)
        if len(kept) == MOST_HELD_OUT:
            break
    if left_out:
        log.warning("%d pictures are left out: they are larger than the bounds, or damaged", left_out)
    return sorted(kept, key=lambda drawing: drawing.identity)
