"""Charts that the papers draw and the report does not: bars with their average, stacked bars, radar."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from orchestrator.report import svg

WIDTH = 720
LEFT, TOP, BOTTOM = 64, 28, 250
TURN = 40  # degrees of the names below bars
# Bars may leave out their foot where they differ by less than this share of their height; the axis then says so.
NARROW = 0.25


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its height and interval; `strong` has a border of its own, `group` stands apart from other groups."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    strong: bool = False
    group: str = ""


def bars(shown: Sequence[Bar], axis: str) -> str:
    """Return bars with their intervals and a dashed line at their average."""
    if not shown:
        return ""
    values = [bar.value for bar in shown]
    ends = [v for bar in shown for v in (bar.low, bar.value, bar.high) if v is not None]
    low, high, cut = _range(values, ends)
    y = svg.scale(low, high, BOTTOM, TOP)
    gaps = sum(a.group != b.group for a, b in itertools.pairwise(shown))
    step = (WIDTH - 12 - LEFT) / (len(shown) + 0.6 * gaps)
    parts = [svg.y_axis(y, low, high, LEFT, WIDTH - 12, f"{axis} (axis begins at {svg.short(low)})" if cut else axis)]
    place, before = LEFT + step / 2, shown[0].group
    names = []
    for bar in shown:
        place += 0.6 * step * (bar.group != before)
        before = bar.group
        foot, head = y(max(low, min(0.0, high))), y(bar.value)
        text = f"{bar.label}: {bar.value:.4f}"
        text += "" if bar.low is None or bar.high is None else f" [{bar.low:.4f}, {bar.high:.4f}]"
        parts.append(f'<g class="{"marked" if bar.strong else "bar"}"><title>{escape(text)}</title>')
        top, tall = min(foot, head), max(abs(foot - head), 0.5)
        parts.append(
            f'<rect x="{place - 0.35 * step:.1f}" y="{top:.1f}" width="{0.7 * step:.1f}" height="{tall:.1f}"/>'
        )
        if bar.low is not None and bar.high is not None:
            parts.append(f'<line class="axis" x1="{place:.1f}" x2="{place:.1f}" y1="{y(bar.low):.1f}" ')
            parts.append(f'y2="{y(bar.high):.1f}"/>')
        parts.append("</g>")
        names.append((place, bar.label))
        place += step
    average = sum(values) / len(values)
    parts.append(f'<g><title>average {average:.4f}</title><line class="zero" x1="{LEFT}" x2="{WIDTH - 12}" ')
    parts.append(f'y1="{y(average):.1f}" y2="{y(average):.1f}"/></g>')
    return svg.figure(WIDTH, BOTTOM + _foot(names), [*parts, *_names(names)], f"{axis}, average dashed")


def stacked(shown: Mapping[str, Mapping[str, float]], axis: str) -> str:
    """Return one bar a name, its parts on each other (those below zero downwards); `shown` is bar -> part -> height."""
    if not any(shown.values()):
        return ""
    parts_of = list(dict.fromkeys(part for heights in shown.values() for part in heights))
    above = [sum(v for v in heights.values() if v > 0) for heights in shown.values()]
    below = [sum(v for v in heights.values() if v < 0) for heights in shown.values()]
    low, high = min(*below, 0.0), max(*above, 0.0)
    y = svg.scale(low, high, BOTTOM, TOP)
    step = (WIDTH - 12 - LEFT) / len(shown)
    drawn = [svg.y_axis(y, low, high, LEFT, WIDTH - 12, axis)]
    names = []
    for i, (name, heights) in enumerate(shown.items()):
        place = LEFT + step * (i + 0.5)
        up = down = 0.0
        for part, value in heights.items():
            base = up if value > 0 else down
            up, down = (up + value, down) if value > 0 else (up, down + value)
            top, tall = min(y(base), y(base + value)), abs(y(base) - y(base + value))
            colour = parts_of.index(part) % svg.COLOURS
            drawn.append(
                f'<g><title>{escape(f"{name}, {part}: {value:.4f}")}</title><rect x="{place - 0.35 * step:.1f}" '
                f'y="{top:.1f}" width="{0.7 * step:.1f}" height="{tall:.1f}" style="fill:var(--c{colour})"/></g>'
            )
        names.append((place, name))
    drawn.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - 12}" y1="{y(0):.1f}" y2="{y(0):.1f}"/>')
    foot = BOTTOM + _foot(names)
    keys, tall = svg.legend(parts_of, LEFT, foot + 8, WIDTH - 12)
    return svg.figure(WIDTH, foot + tall + 8, [*drawn, *_names(names), keys], axis)


def radar(axes: Sequence[str], lines: Mapping[str, Sequence[float]], told: Mapping[str, Sequence[str]]) -> str:
    """Return one closed line a name, 0 in the middle and 1 outside on every axis; `told` are the values as text."""
    if len(axes) < 3 or not lines:
        return ""
    middle_x, middle_y, reach = WIDTH / 2, 190.0, 130.0
    turns = [2 * math.pi * i / len(axes) - math.pi / 2 for i in range(len(axes))]

    def at(turn: float, share: float) -> str:
        return f"{middle_x + reach * share * math.cos(turn):.1f},{middle_y + reach * share * math.sin(turn):.1f}"

    parts = []
    for share in (0.25, 0.5, 0.75, 1.0):
        parts.append(f'<polygon class="grid" fill="none" points="{" ".join(at(turn, share) for turn in turns)}"/>')
    for turn, name in zip(turns, axes, strict=True):
        x, y = (float(v) for v in at(turn, 1.12).split(","))
        anchor = "middle" if abs(math.cos(turn)) < 0.2 else ("start" if math.cos(turn) > 0 else "end")
        parts.append(f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{escape(name)}</text>')
    for i, (name, shares) in enumerate(lines.items()):
        points = " ".join(at(turn, share) for turn, share in zip(turns, shares, strict=True))
        text = "; ".join(f"{axis} {value}" for axis, value in zip(axes, told[name], strict=True))
        parts.append(f'<g style="color:var(--c{i % svg.COLOURS})"><title>{escape(f"{name}: {text}")}</title>')
        parts.append(f'<polygon class="curve" points="{points}"/></g>')
    keys, tall = svg.legend(list(lines), LEFT, 350, WIDTH - 12)
    return svg.figure(WIDTH, 350 + tall, [*parts, keys], f"{len(axes)} metrics, the best outside")


def _range(values: Sequence[float], ends: Sequence[float]) -> tuple[float, float, bool]:
    """Return the ends of the axis, and whether it leaves out the foot of the bars."""
    low, high = min(ends), max(ends)
    if min(values) > 0 and max(values) - min(values) < NARROW * max(values):
        room = (high - low) or abs(high) * 0.05
        return max(0.0, low - room), high + 0.1 * room, low - room > 0
    return min(low, 0.0), max(high, 0.0), False


def _foot(names: Sequence[tuple[float, str]]) -> int:
    return int(20 + svg.text_width(name for _, name in names) * math.sin(math.radians(TURN)))


def _names(names: Sequence[tuple[float, str]]) -> list[str]:
    y = BOTTOM + 14
    return [
        f'<text x="{x:.1f}" y="{y}" text-anchor="end" transform="rotate(-{TURN} {x:.1f} {y})">{escape(name)}</text>'
        for x, name in names
    ]
