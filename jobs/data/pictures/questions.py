"""Questions about drawings, with answers that follow from labels, pixels, or how a picture was composed.

Chance is that of the drawing and the seed. Wrong names and further drawings come from the pool that the drawing itself
is of: the trained ones, or the unseen ones.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from jobs.data.pictures.canvas import composed
from jobs.data.pictures.colours import colour_of
from jobs.data.pictures.drawings import Drawing
from orchestrator.catalog.pictures import COLOURS, CORNERS, GROUPS, NEGATIVES, NUMBERS

YES_NO = ("yes", "no")
# A name is popular when its kind is one of the so many that have the most drawings.
POPULAR_KINDS = 5
_HOURS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_CLOCK = re.compile(r"clock face ([a-z]+)(?: oclock|-(thirty))")
TIMES = tuple(f"{hour}:{minutes}" for hour in range(1, 13) for minutes in ("00", "30"))


@dataclass(frozen=True, slots=True)
class Asked:
    """One question about one picture: `choices[label]` is right. `part` is the way of POPE's, "" elsewhere."""

    subtask: str
    prompt: str
    choices: tuple[str, ...]
    label: int
    image: bytes
    group: str
    identity: str
    part: str = ""

    @property
    def answer(self) -> str:
        return self.choices[self.label]


@dataclass(frozen=True, slots=True)
class Pool:
    """Drawings that questions are made of, those of the other drawer, and the seed."""

    drawings: Sequence[Drawing]
    others: Sequence[Drawing]
    seed: str

    def dice(self, subtask: str, drawing: Drawing) -> random.Random:
        """Return the source of chance of one drawing's question."""
        return random.Random(f"{self.seed}/{subtask}/{drawing.identity}/{drawing.code}")


def captions(pool: Pool) -> Iterator[Asked]:
    """What is it: its name, among three others of which one is of its kind."""
    by_kind = _names_by_kind(pool)
    every = sorted({name for names in by_kind.values() for name in names})
    for drawing in pool.drawings:
        dice = pool.dice("captions", drawing)
        near = [name for name in by_kind.get(drawing.kind, ()) if name != drawing.name]
        if not drawing.name or len(every) < 4:
            continue
        wrong = [dice.choice(near)] if near else []
        while len(wrong) < 3:
            if (name := dice.choice(every)) not in (drawing.name, *wrong):
                wrong.append(name)
        yield _ask("captions", "A picture of", drawing.name, wrong, dice, drawing)


def group(pool: Pool) -> Iterator[Asked]:
    """Which of the eight groups it is of."""
    for drawing in pool.drawings:
        if drawing.group:
            yield _fixed("group", "What kind of thing is it?\nAnswer:", GROUPS, drawing.group, drawing)


def existence(pool: Pool) -> Iterator[Asked]:
    """Whether the picture shows what is named: its own name once, and in POPE's three ways a name that is not its.

    `random` is any other name, `popular` one of the kinds with the most drawings, `adversarial` one of its own kind.
    """
    by_kind = _names_by_kind(pool)
    every = sorted({name for names in by_kind.values() for name in names})
    for drawing in pool.drawings:
        if not drawing.name:
            continue
        common = [kind for kind in _common_kinds(pool) if kind != drawing.kind][:POPULAR_KINDS]
        popular = sorted({name for kind in common for name in by_kind[kind]})
        for part, names in zip(NEGATIVES, (every, popular, by_kind[drawing.kind]), strict=True):
            dice = pool.dice(f"existence {part}", drawing)
            wrong = [name for name in names if name != drawing.name]
            if not wrong:
                continue
            for answer, name in zip(YES_NO, (drawing.name, dice.choice(wrong)), strict=True):
                prompt = f'Does the picture show "{name}"?\nAnswer:'
                yield _fixed("existence", prompt, YES_NO, answer, drawing, part=part)


def colour(pool: Pool) -> Iterator[Asked]:
    """Which colour most of it has: counted."""
    for drawing in pool.drawings:
        if found := colour_of(drawing.image):
            yield _fixed("colour", "What colour is most of it?\nAnswer:", COLOURS, found, drawing)


def reading(pool: Pool) -> Iterator[Asked]:
    """Which letters, digit or sign are written on it, among four; as it is, and in each corner of a canvas."""
    texts = sorted({text for drawing in pool.drawings if (text := text_of(drawing.name))})
    for drawing in pool.drawings:
        text = text_of(drawing.name)
        if not text or len(texts) < 4:
            continue
        for number, image in enumerate(_everywhere(drawing.image)):
            dice = pool.dice(f"reading {number}", drawing)
            wrong = dice.sample([other for other in texts if other != text], 3)
            yield _ask("reading", "What is written on it?\nAnswer:", text, wrong, dice, drawing, image)


def clock(pool: Pool) -> Iterator[Asked]:
    """What time a clock face shows, among four half hours; as it is, and in each corner of a canvas."""
    for drawing in pool.drawings:
        time = time_of(drawing.name)
        if not time:
            continue
        for number, image in enumerate(_everywhere(drawing.image)):
            dice = pool.dice(f"clock {number}", drawing)
            wrong = dice.sample([other for other in TIMES if other != time], 3)
            yield _ask("clock", "What time is it?\nAnswer:", time, wrong, dice, drawing, image)


def counting(pool: Pool) -> Iterator[Asked]:
    """How many drawings, one to four, lie on a canvas."""
    if len(pool.drawings) < len(NUMBERS):
        return
    for drawing in pool.drawings:
        dice = pool.dice("counting", drawing)
        number = dice.randint(1, len(NUMBERS))
        shown = [drawing, *dice.sample([other for other in pool.drawings if other is not drawing], number - 1)]
        cells = dice.sample(range(4), number)
        image = composed({cell: one.image for cell, one in zip(cells, shown, strict=True)})
        prompt = "How many things are there?\nAnswer:"
        yield _fixed("counting", prompt, NUMBERS, NUMBERS[number - 1], drawing, image, shown)


def position(pool: Pool) -> Iterator[Asked]:
    """In which corner of a canvas the one thing of a group lies, beside one to three of other groups."""
    grouped: dict[str, list[Drawing]] = {}
    for drawing in pool.drawings:
        grouped.setdefault(drawing.group, []).append(drawing)
    for drawing in pool.drawings:
        others = [name for name in GROUPS if name != drawing.group and name in grouped]
        if not drawing.group or len(others) < 3:
            continue
        dice = pool.dice("position", drawing)
        shown = [drawing, *(dice.choice(grouped[name]) for name in dice.sample(others, dice.randint(1, 3)))]
        cells = dice.sample(range(4), len(shown))
        image = composed({cell: one.image for cell, one in zip(cells, shown, strict=True)})
        prompt = f"Where is the {drawing.group}?\nAnswer:"
        yield _fixed("position", prompt, CORNERS, CORNERS[cells[0]], drawing, image, shown)


def drawer(pool: Pool) -> Iterator[Asked]:
    """Whether one hand drew both of two drawings side by side, of different things."""
    sides = (pool.drawings, pool.others)
    if min(map(len, sides)) < 2:
        return
    for drawing in pool.drawings:
        dice = pool.dice("drawer", drawing)
        mine = dice.randrange(2)
        first = drawing if not mine else next((o for o in pool.others if o.code == drawing.code), None)
        if first is None:
            continue
        same = dice.random() < 0.5
        second = first
        while second.identity == first.identity:
            second = dice.choice(sides[mine if same else 1 - mine])
        image = composed({0: first.image, 1: second.image})
        prompt = "Were both drawn by the same hand?\nAnswer:"
        yield _fixed("drawer", prompt, YES_NO, YES_NO[not same], drawing, image, (first, second))


QUESTIONS: Mapping[str, Callable[[Pool], Iterator[Asked]]] = MappingProxyType(
    {
        maker.__name__: maker
        for maker in (captions, group, existence, colour, reading, counting, position, clock, drawer)
    }
)


def text_of(name: str) -> str:
    """Return what an emoji of this name has written on it, in Latin letters, digits or signs; "" for any other."""
    if found := re.fullmatch(r"keycap:? (\S+)", name):
        return "10" if found[1] == "ten" else found[1]
    if name == "hash key":
        return "#"
    if found := re.fullmatch(r"(?:negative squared|circled) latin capital letter ([a-z])", name):
        return found[1].upper()
    if found := re.fullmatch(r"(?:negative )?squared ([a-z]{1,4})( with exclamation mark)?", name):
        return found[1].upper() + ("!" if found[2] else "")
    return ""


def time_of(name: str) -> str:
    """Return the time that a clock face of this name shows, such as 3:30; "" for any other name."""
    found = _CLOCK.fullmatch(name)
    return f"{_HOURS.index(found[1]) + 1}:{'30' if found[2] else '00'}" if found else ""


def _everywhere(image: bytes) -> Iterator[bytes]:
    yield image
    yield from (composed({cell: image}) for cell in range(4))


def _names_by_kind(pool: Pool) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for drawing in pool.drawings:
        if drawing.name:
            found.setdefault(drawing.kind, set()).add(drawing.name)
    return {kind: sorted(names) for kind, names in found.items()}


def _common_kinds(pool: Pool) -> list[str]:
    counts = Counter(drawing.kind for drawing in pool.drawings if drawing.name)
    return sorted(counts, key=lambda kind: (-counts[kind], kind))


def _ask(
    subtask: str,
    prompt: str,
    answer: str,
    wrong: Sequence[str],
    dice: random.Random,
    drawing: Drawing,
    image: bytes | None = None,
) -> Asked:
    choices = [answer, *wrong]
    dice.shuffle(choices)
    return _fixed(subtask, prompt, tuple(choices), answer, drawing, image)


def _fixed(
    subtask: str,
    prompt: str,
    choices: tuple[str, ...],
    answer: str,
    drawing: Drawing,
    image: bytes | None = None,
    shown: Sequence[Drawing] = (),
    part: str = "",
) -> Asked:
    identity = "+".join(dict.fromkeys(one.identity for one in shown or (drawing,)))
    image = drawing.image if image is None else image
    return Asked(subtask, prompt, choices, choices.index(answer), image, drawing.group, identity, part)
