"""Figures as small inline SVG: no library, no script; colours come from the page, so they follow light and dark.

A figure keeps its numbers in `<title>` elements (tooltips, and text for a screen reader).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 12  # CSS variables --c0 .. --c11 of the page
POINTS = 240
TOP = 28  # room for the name of the vertical axis


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


def forest(rows: Sequence[Interval], axis: str) -> str:
    """Return differences with their intervals around zero; resolved ones are solid."""
    if not rows:
        return ""
    ends = [v for row in rows for v in (row.low, row.middle, row.high, 0.0) if v is not None]
    left, width, height = _text_width(row.label for row in rows) + 14, 720, 26 * len(rows) + 44
    x = _scale(min(ends), max(ends), left, width - 16)
    parts = [_x_axis(x, min(ends), max(ends), 8, height - 34, axis)]
    parts.append(f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="8" y2="{height - 34}"/>')
    for i, row in enumerate(rows):
        y = 22 + 26 * i
        parts.append(f'<g class="{"strong" if row.strong else "weak"}"><title>{escape(row.title)}</title>')
        parts.append(f'<text x="{left - 10}" y="{y + 4}" text-anchor="end">{escape(row.label)}</text>')
        if row.low is not None and row.high is not None:
            parts.append(f'<line class="whisker" x1="{x(row.low):.1f}" x2="{x(row.high):.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot" cx="{x(row.middle):.1f}" cy="{y}" r="5"/></g>')
    return _svg(width, height, parts, f"differences to the baseline in {axis}")


def curves(lines: Sequence[Line], axis: str, markers: Mapping[float, str] | None = None, axis_x: str = "step") -> str:
    """Return curves with their seed bands; `markers` are vertical lines with a label (phase changes)."""
    lines = [line for line in lines if len(line.xs) > 1]
    if not lines:
        return ""
    legend_rows = math.ceil(len(lines) / 3)
    width, bottom = 720, 300
    xs = [v for line in lines for v in (line.xs[0], line.xs[-1])]
    ys = _trimmed([v for line in lines for v in (*line.lows, *line.highs)])
    x, y = _scale(min(xs), max(xs), 64, width - 12), _scale(ys[0], ys[1], bottom, TOP)
    parts = [_x_axis(x, min(xs), max(xs), TOP, bottom, axis_x), _y_axis(y, ys[0], ys[1], 64, width - 12, axis)]
    for at, label in sorted((markers or {}).items()):
        parts.append(f'<line class="marker" x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text class="small" x="{x(at) + 4:.1f}" y="{TOP + 10}">{escape(label)}</text>')
    for i, line in enumerate(lines):
        keep = _thin(len(line.xs))
        top = [f"{x(line.xs[j]):.1f},{_within(y(line.highs[j]), TOP, bottom):.1f}" for j in keep]
        base = [f"{x(line.xs[j]):.1f},{_within(y(line.lows[j]), TOP, bottom):.1f}" for j in reversed(keep)]
        middle = [f"{x(line.xs[j]):.1f},{_within(y(line.means[j]), TOP, bottom):.1f}" for j in keep]
        dashed = ' stroke-dasharray="6 3"' if i >= COLOURS else ""
        parts.append(f'<g style="color:var(--c{i % COLOURS})"><title>{escape(line.label)}</title>')
        parts.append(f'<polygon class="band" points="{" ".join(top + base)}"/>')
        parts.append(f'<polyline class="curve" points="{" ".join(middle)}"{dashed}/></g>')
        column, row = i % 3, i // 3
        lx, ly = 64 + column * 218, bottom + 52 + row * 20
        parts.append(f'<g style="color:var(--c{i % COLOURS})"><line class="curve" x1="{lx}" x2="{lx + 22}" ')
        parts.append(
            f'y1="{ly - 4}" y2="{ly - 4}"{dashed}/></g><text x="{lx + 28}" y="{ly}">{escape(line.label)}</text>'
        )
    return _svg(width, bottom + 48 + 20 * legend_rows, parts, f"{axis} by {axis_x}")


def heatmap(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Mapping[tuple[int, int], float],
    *,
    label: str,
    diverging: bool = False,
    text: Callable[[float], str] | None = None,
) -> str:
    """Return a matrix of coloured squares; `diverging` centres the colours on zero, missing squares stay empty."""
    if not values:
        return ""
    left, top = _text_width(rows) + 14, 20
    size = 46 if text else max(6, min(26, 560 // max(len(columns), 1)))
    tall = 28 if text else min(size, 22)
    slanted = any(len(column) > 6 for column in columns)
    shown = columns if size >= 14 else [c if i % math.ceil(14 / size) == 0 else "" for i, c in enumerate(columns)]
    bottom = top + tall * len(rows)
    foot = _text_width(shown) * 0.75 + 12 if slanted else 22
    low, high = min(values.values()), max(values.values())
    reach = max(abs(low), abs(high)) or 1.0
    parts = []
    for (r, c), value in sorted(values.items()):
        share = abs(value) / reach if diverging else (value - low) / ((high - low) or 1.0)
        colour = "var(--cold)" if diverging and value < 0 else "var(--warm)"
        px, py = left + c * size, top + r * tall
        title = f"{rows[r]} x {columns[c]}: {value:.4f}"
        parts.append(f'<g><title>{escape(title)}</title><rect class="square" x="{px}" y="{py}" width="{size}" ')
        parts.append(f'height="{tall}" style="fill:{colour};fill-opacity:{0.04 + 0.6 * share:.3f}"/>')
        if text:
            parts.append(f'<text class="value" x="{px + size / 2}" y="{py + tall / 2 + 4}" text-anchor="middle">')
            parts.append(f"{escape(text(value))}</text>")
        parts.append("</g>")
    for r, name in enumerate(rows):
        parts.append(
            f'<text x="{left - 8}" y="{top + r * tall + tall / 2 + 4}" text-anchor="end">{escape(name)}</text>'
        )
    for c, name in enumerate(shown):
        px = left + c * size + size / 2
        turn = f' transform="rotate(-50 {px} {bottom + 14})" text-anchor="end"' if slanted else ' text-anchor="middle"'
        parts.append(f'<text x="{px}" y="{bottom + 14}"{turn}>{escape(name)}</text>' if name else "")
    told = f"{label}: {low:.4g} to {high:.4g}"
    parts.append(f'<text class="small" x="4" y="12">{escape(told)}</text>')
    width = max(left + size * len(columns) + 12, _text_width([told]))
    return _svg(width, int(bottom + foot + 8), parts, label, fixed=True)


def scatter(spots: Sequence[Spot], x_axis: str, y_axis: str) -> str:
    """Return points with labels; those of the front are solid and joined."""
    if not spots:
        return ""
    width, bottom = 720, 330
    xs, ys = [spot.x for spot in spots], [spot.y for spot in spots]
    x = _scale(min(xs), max(xs), 84, width - 130)
    y = _scale(min(ys), max(ys), bottom - 12, TOP + 8)
    parts = [
        _x_axis(x, min(xs), max(xs), 14, bottom, x_axis),
        _y_axis(y, min(ys), max(ys), 84, width - 130, y_axis),
    ]
    front = sorted((spot for spot in spots if spot.front), key=lambda spot: spot.x)
    joined = " ".join(f"{x(spot.x):.1f},{y(spot.y):.1f}" for spot in front)
    parts.append(f'<polyline class="front" points="{joined}"/>')
    taken: list[tuple[float, float]] = []
    for spot in sorted(spots, key=lambda spot: not spot.front):
        px, py = x(spot.x), y(spot.y)
        parts.append(f'<g class="{"strong" if spot.front else "weak"}"><title>{escape(spot.title)}</title>')
        parts.append(f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="5"/>')
        # A label that would lie on another one is left to the tooltip.
        if all(abs(py - other_y) > 13 or abs(px - other_x) > 110 for other_x, other_y in taken):
            parts.append(f'<text class="small" x="{px + 9:.1f}" y="{py + 4:.1f}">{escape(spot.label)}</text>')
            taken.append((px, py))
        parts.append("</g>")
    return _svg(width, bottom + 44, parts, f"{y_axis} against {x_axis}")


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round values that cover low..high."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _svg(width: float, height: float, parts: Sequence[str], label: str, *, fixed: bool = False) -> str:
    style = f' style="min-width:{min(width, 560):.0f}px;max-width:{width:.0f}px"' if fixed else ""
    return (
        f'<div class="figure"><svg viewBox="0 0 {width:.0f} {height:.0f}" role="img"{style}'
        f' aria-label="{escape(label)}">{"".join(parts)}</svg></div>'
    )


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    if not high > low:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _x_axis(x: Callable[[float], float], low: float, high: float, top: float, bottom: float, label: str) -> str:
    parts = [f'<line class="axis" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{bottom}" y2="{bottom}"/>']
    for tick in ticks(low, high):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(
            f'<text class="small" x="{x(tick):.1f}" y="{bottom + 14}" text-anchor="middle">{_short(tick)}</text>'
        )
    middle = (x(low) + x(high)) / 2
    return "".join([*parts, f'<text x="{middle:.1f}" y="{bottom + 30}" text-anchor="middle">{escape(label)}</text>'])


def _y_axis(y: Callable[[float], float], low: float, high: float, left: float, right: float, label: str) -> str:
    parts = []
    for tick in ticks(low, high):
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(
            f'<text class="small" x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
        )
    return "".join([*parts, f'<text class="small" x="{left - 56}" y="11">{escape(label)}</text>'])


def _short(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-4):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:.6g}"


def _text_width(texts: Iterable[str]) -> float:
    return 7.2 * max((len(text) for text in texts), default=0)


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
