"""Names in figures: none is cut, for a phone shows no tooltip."""

from __future__ import annotations

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.report import plots, svg

LONG = (
    "a_schedule_with_a_very_long_name_that_fits_nowhere, not even on two of the lines of a figure that is a page wide"
)


@pytest.mark.parametrize(
    ("name", "characters", "lines"),
    [
        ("val_loss", 20, ["val_loss"]),
        ("bits per byte of held-out text", 14, ["bits per byte", "of held-out", "text"]),
        ("none->router", 8, ["none->", "router"]),
        ("arc_challenge/acc", 10, ["arc_", "challenge/", "acc"]),
        ("unbreakable", 4, ["unbr", "eaka", "ble"]),
        ("one unbreakable", 6, ["one", "unbrea", "kable"]),
        ("", 10, [""]),
    ],
)
def test_a_name_is_broken_at_spaces_then_behind_signs_then_anywhere(
    name: str, characters: int, lines: list[str]
) -> None:
    assert svg.lines_of(name, characters * svg.CHARACTER + 0.5) == lines


@given(st.text(alphabet="ab _/->=.", max_size=60), st.integers(1, 30))
def test_lines_hold_the_whole_name_and_no_more_than_fits(name: str, characters: int) -> None:
    lines = svg.lines_of(name, characters * svg.CHARACTER + 0.5)
    assert all(len(line) <= characters for line in lines)
    assert "".join("".join(lines).split()) == "".join(name.split())


def drawn(figure: str) -> str:
    """Return what a figure shows without its tooltips."""
    shown = re.sub(r"<title>.*?</title>", "", figure)
    return html.unescape("".join(re.findall(r">([^<>]+)<", shown)))


def bottoms(figure: str) -> tuple[float, float]:
    """Return the height of a figure, and where its lowest text stands."""
    height = float(re.search(r'viewBox="0 0 \d+ (\d+)"', figure)[1])
    return height, max(float(y) for y in re.findall(r'<(?:text|tspan) [^>]*?y="([\d.]+)"', figure))


def test_every_figure_writes_long_names_out_and_is_tall_enough_for_them() -> None:
    row = plots.Interval(LONG, 0.1, 0.0, 0.2, True, "title")
    line = plots.Line(LONG, [0, 1], [0, 1], [0, 1], [0, 1])
    figures = [
        plots.forest([row, row], "loss"),
        plots.curves([line], "loss"),
        plots.small_scatter({"a": (0, 0), "b": (1, 1)}, LONG, LONG, 0.5),
    ]
    for figure in figures:
        assert "".join(LONG.split()) in "".join(drawn(figure).split())
        height, lowest = bottoms(figure)
        assert lowest + 3 <= height
