"""Questions about pictures: every answer computed again from what is shown, splits by identity, held-out sources."""

from __future__ import annotations

import colorsys
import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from jobs.data.images import digest_of
from jobs.data.item_files import item_blobs
from jobs.data.pictures import sets
from jobs.data.pictures.canvas import composed
from jobs.data.pictures.colours import colour_of, named
from jobs.data.pictures.drawings import Drawing, clip_art, emoji, identity_of, stamps
from jobs.data.pictures.questions import QUESTIONS, Pool, text_of, time_of
from jobs.data.stage import read_rows, split_rows
from orchestrator.catalog.pictures import COLOURS, CORNERS, GROUPS, MIXED, NUMBERS, SUBTASKS, VISION_TASKS
from orchestrator.catalog.pins import FORMATS, PACKAGES
from orchestrator.errors import SourceError
from orchestrator.spec.cell import DataSpec
from tests.picture_samples import blob, emoji_package, emoji_rows, tar

GOOGLE, TWITTER = "npm://emoji-datasource-google@16.0.0", "npm://emoji-datasource-twitter@16.0.0"


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The two emoji packages, small and made here."""
    drawn = {
        PACKAGES["npm", f"emoji-datasource-{drawer}"]: tuple(
            emoji(emoji_package(tmp_path / drawer, drawer, shift), drawer)
        )
        for drawer, shift in (("google", 0), ("twitter", 4096))
    }
    monkeypatch.setattr(sets, "_of", drawn.__getitem__)
    return {package.name.rpartition("-")[2]: drawings for package, drawings in drawn.items()}


def decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def by_hand(red: int, green: int, blue: int) -> str:
    """The colour of one pixel by colorsys and the words of the documentation."""
    hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
    if value < 0.3:
        return "black"
    if saturation < 0.15:
        return "white" if value >= 0.85 else "grey"
    degrees = hue * 360
    if 10 <= degrees < 45 and value < 0.75:
        return "brown"
    limits = [(15, "red"), (42, "orange"), (68, "yellow"), (165, "green"), (255, "blue"), (300, "purple"), (345, "")]
    return next((name for limit, name in limits if degrees < limit), "red")


def test_the_colour_of_a_pixel_is_what_its_hue_says():
    levels = np.arange(0, 256, 15)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3).astype(np.uint8)
    hues = np.array([colorsys.rgb_to_hsv(*pixel)[0] * 360 for pixel in (cube / 255).tolist()])
    borders = np.array([10, 15, 42, 45, 68, 165, 255, 300, 345])
    cube = cube[np.abs(hues[:, None] - borders).min(1) > 1e-6]  # exact on a border is a matter of rounding
    found = [(*COLOURS, "")[index] for index in named(cube)]
    assert found == [by_hand(*pixel) for pixel in cube.tolist()]
    assert {*found} == {*COLOURS, ""}


def test_a_drawing_has_the_colour_of_most_that_is_drawn():
    image = Image.new("RGBA", (10, 10), (0, 255, 0, 0))
    ImageDraw.Draw(image).rectangle((0, 0, 9, 5), fill=(250, 0, 0, 255))
    ImageDraw.Draw(image).rectangle((0, 6, 9, 6), fill=(0, 0, 250, 255))
    sink = io.BytesIO()
    image.save(sink, "PNG")
    assert colour_of(sink.getvalue()) == "red", "6 of 7 rows; what is transparent has no colour"
    ImageDraw.Draw(image).rectangle((0, 3, 9, 5), fill=(0, 250, 0, 255))
    sink = io.BytesIO()
    image.save(sink, "PNG")
    assert colour_of(sink.getvalue()) == "", "3 of 7 rows each"


def test_what_a_drawing_shows_is_the_same_whatever_its_skin_sex_and_direction():
    runners = ("1F3C3", "1F3C3-1F3FB", "1F3C3-200D-2640-FE0F", "1F3C3-1F3FF-200D-2642-FE0F-200D-27A1-FE0F")
    assert {identity_of(code) for code in runners} == {"1F3C3"}
    doctors = ("1F468-200D-2695-FE0F", "1F469-200D-2695-FE0F", "1F9D1-200D-2695-FE0F")
    assert len({identity_of(code) for code in doctors}) == 1
    assert len({identity_of(code) for code in ("2640-FE0F", "2642-FE0F", "27A1-FE0F", "1F3C3", "1F6B6")}) == 5


def test_drawings_are_read_out_of_the_emoji_packages(packages):
    google, twitter = packages["google"], packages["twitter"]
    rows = [row for row in emoji_rows() if row["category"] != "Component"]
    assert len(google) == len(rows)
    assert [(one.identity, one.name, one.group) for one in google] == [(o.identity, o.name, o.group) for o in twitter]
    assert [one.trained for one in google] == [one.trained for one in twitter]
    assert 0.4 < sum(one.trained for one in google) / len(google) < 0.95
    assert {one.group for one in google} == {
        "face",
        "animal or plant",
        "food",
        "place or vehicle",
        "object",
        "symbol",
        "",
    }
    assert not {one.image for one in google} & {one.image for one in twitter}


@pytest.mark.parametrize(
    "name, text, time",
    [
        ("keycap 7", "7", ""),
        ("keycap: *", "*", ""),
        ("keycap ten", "10", ""),
        ("hash key", "#", ""),
        ("negative squared latin capital letter b", "B", ""),
        ("circled latin capital letter m", "M", ""),
        ("squared up with exclamation mark", "UP!", ""),
        ("negative squared ab", "AB", ""),
        ("squared katakana koko", "", ""),
        ("clock face ten oclock", "", "10:00"),
        ("clock face eleven-thirty", "", "11:30"),
        ("alarm clock", "", ""),
    ],
)
def test_names_say_what_is_written_and_what_time_it_is(name, text, time):
    assert (text_of(name), time_of(name)) == (text, time)


def questions(subtask: str, drawings: tuple[Drawing, ...], others: tuple[Drawing, ...] = ()) -> list:
    found = list(QUESTIONS[subtask](Pool(drawings, others, "seed")))
    assert found, subtask
    assert found == list(QUESTIONS[subtask](Pool(drawings, others, "seed")))
    assert all(len({*one.choices}) == len(one.choices) == SUBTASKS[subtask].choices for one in found)
    return found


def test_labels_are_those_of_the_package(packages):
    drawings = packages["google"]
    rows, kinds = {digest_of(one.image): one for one in drawings}, {one.name: one.kind for one in drawings}
    for one in questions("group", drawings):
        assert one.answer == rows[digest_of(one.image)].group
        assert one.choices == GROUPS
    for one in questions("captions", drawings):
        assert one.answer == rows[digest_of(one.image)].name
        near = [name for name in one.choices if kinds[name] == kinds[one.answer]]
        assert len(near) >= 2 or list(kinds.values()).count(kinds[one.answer]) == 1, "one is of its kind"
    for one in questions("colour", drawings):
        seen = Counter(by_hand(*pixel[:3]) for pixel in rgba(one.image) if pixel[3] >= 128)
        assert seen[one.answer] >= 0.6 * seen.total()


def rgba(data: bytes) -> list[tuple[int, int, int, int]]:
    with Image.open(io.BytesIO(data)) as image:
        return [tuple(pixel) for pixel in np.asarray(image.convert("RGBA")).reshape(-1, 4).tolist()]


def test_existence_is_asked_in_three_ways_as_often_with_yes_as_with_no(packages):
    drawings = packages["google"]
    kinds = {one.name: one.kind for one in drawings}
    common = [kind for kind, _ in Counter(kinds.values()).most_common(6)]
    shown = {digest_of(one.image): one for one in drawings}
    answers: Counter[tuple[str, str]] = Counter()
    for one in questions("existence", drawings):
        name, drawing = one.prompt.split('"')[1], shown[digest_of(one.image)]
        assert (one.answer == "yes") == (name == drawing.name)
        answers[one.part, one.answer] += 1
        if one.answer == "no" and one.part == "adversarial":
            assert kinds[name] == drawing.kind
        if one.answer == "no" and one.part == "popular":
            assert kinds[name] in common
            assert kinds[name] != drawing.kind
    for part in ("random", "popular", "adversarial"):
        assert answers[part, "yes"] == answers[part, "no"] > 0


def occupied(image: np.ndarray) -> set[str]:
    """The corners of a canvas in which something lies, seen in its pixels."""
    halves = (slice(0, 64), slice(64, 128))
    cells = {name: image[halves["bottom" in name], halves["right" in name]] for name in CORNERS}
    return {name for name, cell in cells.items() if (cell != 255).any()}


def test_number_and_place_are_what_the_canvas_shows(packages):
    drawings = packages["google"]
    for one in questions("counting", drawings):
        things = one.identity.split("+")
        assert one.answer == NUMBERS[len(occupied(decoded(one.image))) - 1]
        assert len(things) == NUMBERS.index(one.answer) + 1
    groups = {one.identity: one for one in drawings}
    for one in questions("position", drawings):
        image = decoded(one.image)
        assert one.answer in occupied(image)
        shown = [groups[name] for name in one.identity.split("+")]
        (asked,) = [drawing for drawing in shown if f"the {drawing.group}?" in one.prompt]
        assert len({drawing.group for drawing in shown}) == len(shown)
        top, left = 64 * ("bottom" in one.answer), 64 * ("right" in one.answer)
        alone = decoded(composed({0: asked.image}))[:64, :64]
        assert (image[top : top + 64, left : left + 64] == alone).all(), "pixel by pixel what was asked for"


def test_a_drawing_of_one_cell_is_placed_as_it_is():
    data = blob((200, 30, 60), 5)
    with Image.open(io.BytesIO(data)) as image:
        over = np.asarray(image).astype(int)
    expected = np.where(over[..., 3:] == 255, over[..., :3], 255)
    found = decoded(composed({3: data}))
    assert (found[64:, 64:] == expected).all()
    assert (found[:64] == 255).all()


def test_reading_and_clock_are_asked_of_signs_and_clocks_wherever_they_lie(packages):
    for subtask, of in (("reading", text_of), ("clock", time_of)):
        found = questions(subtask, packages["google"])
        truths = {one.identity: of(one.name) for one in packages["google"] if of(one.name)}
        assert Counter(one.identity for one in found) == dict.fromkeys(truths, 5)
        assert all(one.answer == truths[one.identity] for one in found)
        places = {tuple(sorted(occupied(decoded(one.image)))) for one in found if decoded(one.image).shape[0] == 128}
        assert places == {(corner,) for corner in CORNERS}


def test_the_drawer_is_seen_in_the_pixels(packages):
    hands = {
        decoded(composed({0: one.image}))[:64, :64].tobytes(): (hand, one.identity)
        for hand, drawings in packages.items()
        for one in drawings
    }
    answers: Counter[tuple[str, str, str]] = Counter()
    for one in questions("drawer", packages["google"], packages["twitter"]):
        image = decoded(one.image)
        (first, this), (second, that) = (hands[image[:64, side : side + 64].tobytes()] for side in (0, 64))
        assert this != that
        assert one.answer == ("yes" if first == second else "no")
        answers[one.answer, first, second] += 1
    assert len(answers) == 4


def test_nothing_that_is_asked_is_trained_on_whoever_drew_it(packages):
    images: dict[str, bytes] = {}
    trained: set[str] = set()
    for name in ("captions", "questions", "drawer"):
        rows = read_rows(DataSpec(f"{GOOGLE}/{name}", format="vision"), seed=1, images=images)
        trained |= {thing for row in rows for thing in row.identity.split("+")}
        if name == "questions":
            assert {row.subtask for row in rows} == {*MIXED}
            exist = Counter(row.response for row in rows if row.subtask == "existence")
            assert exist[" yes"] == exist[" no"]
            train, heldout = split_rows(rows, DataSpec("x", format="vision", holdout=0.1), 1)
            assert heldout
            shown = {thing for row in train for thing in row.identity.split("+")}
            assert not shown & {row.identity.split("+")[0] for row in heldout}
    assert not {digest_of(one.image) for one in packages["twitter"]} & set(images), "the other hand is held out"
    tasks = [task for task in VISION_TASKS if task not in ("vision_clock", "vision_reading")]
    for source in (GOOGLE, TWITTER):
        blobs, counts = item_blobs(DataSpec(f"{source}/items", format="items"), tasks)
        assert set(counts) == set(tasks)
        for task in tasks:
            for line in blobs[f"{task}/test.jsonl"].splitlines():
                item = json.loads(line)
                assert not trained & set(item["identity"].split("+"))
                assert item["answer"] == item["choices"][item["label"]]


def test_a_set_follows_from_the_seed_and_the_package_alone(packages):
    def made(seed: int) -> list:
        return list(read_rows(DataSpec(f"{GOOGLE}/questions", format="vision"), seed=seed, images={}))

    assert made(1) == made(1)
    one, other = made(1), made(2)
    assert [row for row in one if row.subtask == "group"] == [row for row in other if row.subtask == "group"]
    assert one != other


def test_a_held_out_source_answers_what_its_labels_say(tmp_path):
    red = blob((250, 0, 0), 1)
    art = {f"usr/share/openclipart/png/{folder}/x_{n}.png": red for folder in ("food", "tools") for n in range(9)}
    others = {"usr/share/openclipart/png/computer/y.png": red, "usr/share/openclipart/png/food/broken.png": red[:50]}
    found = clip_art(tar(tmp_path / "art.tgz", {**art, **others}))
    assert {(one.group, one.name) for one in found} <= {("food", ""), ("object", "")}
    assert found
    base = "usr/share/tuxpaint/stamps"
    files = {
        f"{base}/food/fruit/apple.png": red,
        f"{base}/food/fruit/apple.txt": b"An apple (a fruit).\nde.utf8=Apfel",
        f"{base}/food/fruit/nameless.png": red,
        f"{base}/animals/cartoon/cat.png": red,
        f"{base}/animals/cartoon/cat.txt": b"A cat.",
        f"{base}/space/moon.png": red,
        f"{base}/space/moon.txt": b"The moon! It goes around.",
        f"{base}/space/story.png": red,
        f"{base}/space/story.txt": b"This one stands for nothing that has a name.",
    }
    shown = [(one.name, one.group, one.kind) for one in stamps(tar(tmp_path / "stamps.tgz", files))]
    assert shown == [("apple", "food", "food/fruit"), ("moon", "", "space")]


def test_a_source_says_which_tasks_it_cannot_answer(packages, monkeypatch):
    drawings = tuple(one for one in packages["google"] if not time_of(one.name))
    monkeypatch.setattr(sets, "_of", lambda package: drawings)
    for task, cause in (("arc_easy", "no question about pictures"), ("vision_clock", "")):
        with pytest.raises(SourceError, match="has no items of task") as caught:
            item_blobs(DataSpec(f"{GOOGLE}/items", format="items"), [task])
        assert cause in caught.value.cause
    with pytest.raises(SourceError, match="holds items"):
        read_rows(DataSpec(f"{GOOGLE}/items", format="vision"))


def test_every_set_that_a_package_names_is_made_by_a_question():
    named_sets = {name for package in PACKAGES.values() if package.scheme != "wheel" for name in package.sets}
    assert named_sets == {*QUESTIONS, "questions", "items"}
    assert {*QUESTIONS} == {*SUBTASKS}
    assert {FORMATS[name] for name in QUESTIONS} == {"vision"}
    assert all(package.licence and package.megabytes for package in PACKAGES.values() if package.scheme != "wheel")
