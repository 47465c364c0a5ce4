"""Figures as small inline SVG: no library, no script; colours come from the page, so they follow light and dark.

A figure keeps its numbers in `<title>` elements (tooltips, and text for a screen reader).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from orchestrator.report import picture, svg

POINTS = 240
# A heat map of more squares than this is one picture; its values are read off by the page's script.
MOST_SQUARES = 120
TOP = 28  # room for the name of the vertical axis
FEW_BANDS = 6


Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Interval:
    """One row of a forest plot."""

    label: str
    middle: float
    low: float | None
    high: float | None
    strong: bool
    title: str


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: x, mean, and the band over seeds."""

    label: str
    xs: Sequence[float]
    means: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


@dataclass(frozen=True, slots=True)
class Spot:
    """One point of a scatter plot."""

    label: str
    x: float
    y: float
    front: bool
    title: str


def band(label: str, by_x: Mapping[float, Sequence[float]] | Mapping[int, Sequence[float]]) -> Line:
    """Return the curve of the means at each x, its band from the least to the greatest value."""
    values: dict[float, Sequence[float]] = dict(sorted(by_x.items()))
    means = [sum(found) / len(found) for found in values.values()]
    return Line(label, list(values), means, [min(v) for v in values.values()], [max(v) for v in values.values()])


def forest(rows: Sequence[Interval], axis: str) -> str:
    """Return differences with their intervals around zero; resolved ones are solid."""
    if not rows:
        return ""
    ends = [v for row in rows for v in (row.low, row.middle, row.high, 0.0) if v is not None]
    names = [svg.lines_of(row.label, 300) for row in rows]
    tall = [26 + svg.LINE * (len(lines) - 1) for lines in names]
    left, width, height = svg.text_width(line for lines in names for line in lines) + 14, 720, sum(tall) + 44
    x = svg.scale(min(ends), max(ends), left, width - 16)
    parts = [svg.x_axis(x, min(ends), max(ends), 8, height - 34, axis)]
    parts.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="8" y2="{height - 34}"/>')
    top = 9
    for row, lines, own in zip(rows, names, tall, strict=True):
        y = top + own // 2
        parts.append(f'<g class="{"strong" if row.strong else "weak"}"><title>{escape(row.title)}</title>')
        parts.append(svg.text(lines, left - 10, y + 4 - svg.LINE * (len(lines) - 1) / 2, ' text-anchor="end"'))
        if row.low is not None and row.high is not None:
            parts.append(f'<line class="whisker" x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot" cx="{x(row.middle):.1f}" cy="{y}" r="5"/></g>')
        top += own
    return svg.figure(width, height, parts, f"differences to the baseline in {axis}")


def curves(lines: Sequence[Line], axis: str, markers: Mapping[float, str] | None = None, axis_x: str = "step") -> str:
    """Return curves with their seed bands; `markers` are vertical lines with a label (phase changes)."""
    lines = [line for line in lines if len(line.xs) > 1]
    if not lines:
        return ""
    width, bottom = 720, 300
    xs = [v for line in lines for v in (line.xs[0], line.xs[-1])]
    ys = _trimmed([v for line in lines for v in (*line.lows, *line.highs)])
    x, y = svg.scale(min(xs), max(xs), 64, width - 12), svg.scale(ys[0], ys[1], bottom, TOP)
    parts = [svg.x_axis(x, min(xs), max(xs), TOP, bottom, axis_x), svg.y_axis(y, ys[0], ys[1], 64, width - 12, axis)]
    for at, label in sorted((markers or {}).items()):
        parts.append(
            f'<line class="marker" data-vx="{at:g}" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP}" y2="{bottom}"/>'
        )
        parts.append(f'<text class="small" x="{x(at) + 4:.1f}" y="{TOP + 10}">{escape(label)}</text>')
    bands: list[str] = []
    drawn: list[str] = []
    # Many bands on each other would be one grey area.
    faint = "" if len(lines) <= FEW_BANDS else ' fill-opacity="0.35"'
    for i, line in enumerate(lines):
        keep = _thin(len(line.xs))
        top = [f"{x(line.xs[j]):.1f},{_within(y(line.highs[j]), TOP, bottom):.1f}" for j in keep]
        base = [f"{x(line.xs[j]):.1f},{_within(y(line.lows[j]), TOP, bottom):.1f}" for j in reversed(keep)]
        middle = [f"{x(line.xs[j]):.1f},{_within(y(line.means[j]), TOP, bottom):.1f}" for j in keep]
        dashed = svg.DASHED if i >= svg.COLOURS else ""
        colour = f'style="color:var(--c{i % svg.COLOURS})"'
        name = f'data-name="{escape(line.label)}"'
        bands.append(f'<polygon class="band" {name} {colour}{faint} points="{" ".join(top + base)}"/>')
        drawn.append(f'<g class="line" {name} {colour}><title>{escape(line.label)}</title>')
        drawn.append(f'<polyline class="curve" points="{" ".join(middle)}"{dashed}/></g>')
    keys, tall = svg.legend([line.label for line in lines], 64, bottom + 40, width - 12)
    parts += [*bands, *drawn, keys]
    # What the page's script needs to read values off the curves, and to draw them on a logarithmic axis.
    ends = (min(xs), max(xs), x(min(xs)), x(max(xs)), ys[0], ys[1], y(ys[0]), y(ys[1]))
    data = f'data-axes="{" ".join(f"{v:.9g}" for v in ends)}" data-x="{escape(axis_x)}"'
    return svg.figure(width, bottom + 40 + tall, parts, f"{axis} by {axis_x}", data=data)


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[int, int], float],
    *,
    label: str,
    centre: float | None = None,
    reach: float = 0.0,
    text: Callable[[float], str] | None = None,
) -> str:
    """Return a matrix of coloured squares; missing ones stay empty.

    With a `centre` values above and below it have colours of their own, darkest `reach` away (0: at the farthest).
    """
    if not values:
        return ""
    left, top = svg.text_width(rows) + 14, 20
    size = 46 if text else max(6, min(26, 560 // max(len(columns), 1)))
    tall = 28 if text else min(size, 22)
    slanted = any(len(column) > 6 for column in columns)
    shown = columns if size >= 14 else [c if i % math.ceil(14 / size) == 0 else "" for i, c in enumerate(columns)]
    bottom = top + tall * len(rows)
    foot = svg.text_width(shown) * 0.75 + 12 if slanted else 22
    low, high = min(values.values()), max(values.values())
    middle = centre or 0.0
    reach = reach or max(abs(low - middle), abs(high - middle)) or 1.0
    told = f"{label}: {low:.4g} to {high:.4g}"
    parts = []
    if text is None and len(values) > MOST_SQUARES:
        parts.append(
            picture.squares(
                rows,
                columns,
                values,
                centre=centre,
                reach=reach,
                box=(left, top, size * len(columns), tall * len(rows)),
            )
        )
        values = {}
    for (r, c), value in sorted(values.items()):
        share = min(1.0, abs(value - middle) / reach) if centre is not None else (value - low) / ((high - low) or 1.0)
        colour = "var(--cold)" if centre is not None and value < middle else "var(--warm)"
        px, py = left + c * size, top + r * tall
        title = f"{rows[r]} x {columns[c]}: {value:.4f}"
        parts.append(f'<g><title>{escape(title)}</title><rect class="square" x="{px}" y="{py}" width="{size}" ')
        parts.append(f'height="{tall}" style="fill:{colour};fill-opacity:{0.04 + 0.6 * share:.3f}"/>')
        if text:
            parts.append(f'<text class="value" x="{px + size / 2}" y="{py + tall / 2 + 4}" text-anchor="middle">')
            parts.append(f"{escape(text(value))}</text>")
        parts.append("</g>")
    every = math.ceil(14 / tall)
    for r, name in enumerate(rows):
        if r % every:
            continue
        parts.append(
            f'<text x="{left - 8}" y="{top + r * tall + tall / 2 + 4}" text-anchor="end">{escape(name)}</text>'
        )
    for c, name in enumerate(shown):
        px = left + c * size + size / 2
        turn = f' transform="rotate(-50 {px} {bottom + 14})" text-anchor="end"' if slanted else ' text-anchor="middle"'
        parts.append(f'<text x="{px}" y="{bottom + 14}"{turn}>{escape(name)}</text>' if name else "")
    parts.append(f'<text class="small" x="4" y="12">{escape(told)}</text>')
    width = max(left + size * len(columns) + 12, svg.text_width([told]))
    return svg.figure(width, int(bottom + foot + 8), parts, label, fixed=True)


def scatter(spots: Sequence[Spot], x_axis: str, y_axis: str) -> str:
    """Return points with labels; those of the front are solid and joined."""
    if not spots:
        return ""
    width, bottom, right = 720, 330, 700
    xs, ys = [spot.x for spot in spots], [spot.y for spot in spots]
    x = svg.scale(min(xs), max(xs), 84, right)
    y = svg.scale(min(ys), max(ys), bottom - 26, TOP + 8)
    parts = [svg.x_axis(x, min(xs), max(xs), 14, bottom, x_axis), svg.y_axis(y, min(ys), max(ys), 84, right, y_axis)]
    front = sorted((spot for spot in spots if spot.front), key=lambda spot: spot.x)
    joined = " ".join(f"{x(spot.x):.1f},{y(spot.y):.1f}" for spot in front)
    parts.append(f'<polyline class="front" points="{joined}"/>')
    taken: list[Box] = [(0, bottom - 2, width, bottom + 44)]  # the axis and its numbers
    taken += [(x(s.x) - 6, y(s.y) - 6, x(s.x) + 6, y(s.y) + 6) for s in spots]
    for spot in sorted(spots, key=lambda spot: not spot.front):
        px, py = x(spot.x), y(spot.y)
        parts.append(f'<g class="{"strong" if spot.front else "weak"}"><title>{escape(spot.title)}</title>')
        parts.append(f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="5"/>')
        parts.append(_beside(spot.label, px, py, taken, width) + "</g>")
    return svg.figure(width, bottom + 44, parts, f"{y_axis} against {x_axis}")


def small_scatter(points: Mapping[str, tuple[float, float]], x_axis: str, y_axis: str, r: float) -> str:
    """Return a small scatter plot of (x, y) by name, one of many: no ticks, the correlation below its title."""
    width = 220
    over, under = svg.lines_of(y_axis, width - 12), svg.lines_of(x_axis, width - 20)
    top, below = svg.LINE * (len(over) - 1), svg.LINE * (len(under) - 1)
    bottom = 150 + top
    xs, ys = [x for x, _ in points.values()], [y for _, y in points.values()]
    x, y = svg.scale(min(xs), max(xs), 14, width - 10), svg.scale(min(ys), max(ys), bottom - 8, 40 + top)
    parts = [svg.text(over, 4, 12), f'<text class="small" x="4" y="{27 + top}">r = {r:.2f}</text>']
    parts.append(f'<line class="axis" x1="8" x2="{width - 6}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<line class="axis" x1="8" x2="8" y1="{34 + top}" y2="{bottom}"/>')
    for label, (px, py) in points.items():
        told = f"{label}: {x_axis} {px:.4f}, {y_axis} {py:.4f}"
        parts.append(f'<g class="strong"><title>{escape(told)}</title>')
        parts.append(f'<circle class="dot" cx="{x(px):.1f}" cy="{y(py):.1f}" r="3.5"/></g>')
    parts.append(svg.text(under, width - 6, bottom + 14, ' class="small" text-anchor="end"'))
    return svg.figure(width, bottom + below + 20, parts, f"{y_axis} against {x_axis}")


def _beside(label: str, px: float, py: float, taken: list[Box], width: float) -> str:
    """Return a label right, left, above or below a point; where it would lie on another it is left to the tooltip."""
    long = 6.4 * len(label)
    for left, y, anchor, x in (
        (px + 9, py + 4, "start", px + 9),
        (px - 9 - long, py + 4, "end", px - 9),
        (px - long / 2, py - 10, "middle", px),
        (px - long / 2, py + 18, "middle", px),
    ):
        box = (left, y - 9, left + long, y + 3)
        if left >= 60 and box[2] <= width and not any(_meet(box, other) for other in taken):
            taken.append(box)
            return f'<text class="small" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(label)}</text>'
    return ""


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _thin(n: int) -> list[int]:
    if n <= POINTS:
        return list(range(n))
    return sorted({round(i * (n - 1) / (POINTS - 1)) for i in range(POINTS)})


def _trimmed(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of the values without their last per cent at the top: one spike must not flatten the rest."""
    ordered = sorted(values)
    return ordered[0], ordered[max(0, math.ceil(len(ordered) * 0.99) - 1)]


def _within(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
