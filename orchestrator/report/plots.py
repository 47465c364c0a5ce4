"""Figures as small inline SVG: no library, no script; colours come from the page, so they follow light and dark.

A figure keeps its numbers in `<title>` elements (tooltips, and text for a screen reader).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape, unescape

COLOURS = 12  # CSS variables --c0 .. --c11 of the page
POINTS = 240
FEW_BANDS = 6
TOP = 28  # room for the name of the vertical axis
# The colours of the page in light and dark, and how the parts of a figure use them.
LIGHT = """--text:#1c2330;--quiet:#667085;--page:#fff;--panel:#f6f7f9;--line:#d8dde5;--accent:#0b63ce;--warm:#d1495b;
--cold:#2a78c2;--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#cc79a7;--c4:#b58900;--c5:#56a3d9;--c6:#7a4fbf;--c7:#8c564b;
--c8:#3f7f1f;--c9:#e0447c;--c10:#5f6b7a;--c11:#00a0a0"""
DARK = """--text:#e6e9ef;--quiet:#98a2b3;--page:#14171c;--panel:#1d2127;--line:#363c46;--accent:#7db4ff;--warm:#ff7a8a;
--cold:#6fb4f2;--c0:#4db1ec;--c1:#ff8a3d;--c2:#2fd0a0;--c3:#eaa2cc;--c4:#e3c14a;--c5:#9ad0f5;--c6:#b79bf0;--c7:#cf9c8f;
--c8:#8fce6a;--c9:#ff86ad;--c10:#aab4c2;--c11:#45d3d3"""
RULES = """svg{font-size:12px}svg text{fill:var(--text)}svg .value{font-size:11px}
svg .small{font-size:11px;fill:var(--quiet)}.axis{stroke:var(--quiet)}.grid{stroke:var(--line);stroke-width:.6}
.zero{stroke:var(--text);stroke-dasharray:3 3}.marker{stroke:var(--quiet);stroke-dasharray:4 4}.whisker{stroke-width:2}
.curve{fill:none;stroke:currentColor;stroke-width:1.8}.band{fill:currentColor;opacity:.14}
.front{fill:none;stroke:var(--accent);stroke-dasharray:5 4}
.strong .dot{fill:var(--accent)}.strong .whisker{stroke:var(--accent)}
.weak .dot{fill:var(--page);stroke:var(--quiet);stroke-width:2}.weak .whisker{stroke:var(--quiet)}
.square{stroke:var(--line);stroke-width:.5}
"""
_FIGURE = re.compile(
    r"<h3>(?P<heading>.*?)</h3>|<summary>(?P<summary>.*?)</summary>|(?P<svg><svg .*?</svg>)", re.DOTALL
)
_COLOUR = re.compile(r"var\((--\w+)\)")
_LABEL = re.compile(r'aria-label="([^"]*)"')
_SIZE = re.compile(r'viewBox="0 0 (\d+) (\d+)"')


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
    bands: list[str] = []
    drawn: list[str] = []
    # Many bands on each other would be one grey area.
    faint = "" if len(lines) <= FEW_BANDS else ' fill-opacity="0.35"'
    for i, line in enumerate(lines):
        keep = _thin(len(line.xs))
        top = [f"{x(line.xs[j]):.1f},{_within(y(line.highs[j]), TOP, bottom):.1f}" for j in keep]
        base = [f"{x(line.xs[j]):.1f},{_within(y(line.lows[j]), TOP, bottom):.1f}" for j in reversed(keep)]
        middle = [f"{x(line.xs[j]):.1f},{_within(y(line.means[j]), TOP, bottom):.1f}" for j in keep]
        dashed = ' stroke-dasharray="6 3"' if i >= COLOURS else ""
        colour = f'style="color:var(--c{i % COLOURS})"'
        bands.append(f'<polygon class="band" {colour}{faint} points="{" ".join(top + base)}"/>')
        drawn.append(f"<g {colour}><title>{escape(line.label)}</title>")
        drawn.append(f'<polyline class="curve" points="{" ".join(middle)}"{dashed}/></g>')
        column, row = i % 3, i // 3
        lx, ly = 64 + column * 218, bottom + 52 + row * 20
        drawn.append(
            f'<g {colour}><line class="curve" x1="{lx}" x2="{lx + 22}" y1="{ly - 4}" y2="{ly - 4}"{dashed}/></g>'
        )
        drawn.append(f'<text x="{lx + 28}" y="{ly}">{escape(line.label)}</text>')
    parts += bands + drawn
    return _svg(width, bottom + 48 + 20 * legend_rows, parts, f"{axis} by {axis_x}")


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
    left, top = _text_width(rows) + 14, 20
    size = 46 if text else max(6, min(26, 560 // max(len(columns), 1)))
    tall = 28 if text else min(size, 22)
    slanted = any(len(column) > 6 for column in columns)
    shown = columns if size >= 14 else [c if i % math.ceil(14 / size) == 0 else "" for i, c in enumerate(columns)]
    bottom = top + tall * len(rows)
    foot = _text_width(shown) * 0.75 + 12 if slanted else 22
    low, high = min(values.values()), max(values.values())
    middle = centre or 0.0
    reach = reach or max(abs(low - middle), abs(high - middle)) or 1.0
    parts = []
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
    width, bottom, right = 720, 330, 700
    xs, ys = [spot.x for spot in spots], [spot.y for spot in spots]
    x = _scale(min(xs), max(xs), 84, right)
    y = _scale(min(ys), max(ys), bottom - 12, TOP + 8)
    parts = [_x_axis(x, min(xs), max(xs), 14, bottom, x_axis), _y_axis(y, min(ys), max(ys), 84, right, y_axis)]
    front = sorted((spot for spot in spots if spot.front), key=lambda spot: spot.x)
    joined = " ".join(f"{x(spot.x):.1f},{y(spot.y):.1f}" for spot in front)
    parts.append(f'<polyline class="front" points="{joined}"/>')
    taken: list[Box] = []
    taken += [(x(s.x) - 6, y(s.y) - 6, x(s.x) + 6, y(s.y) + 6) for s in spots]
    for spot in sorted(spots, key=lambda spot: not spot.front):
        px, py = x(spot.x), y(spot.y)
        parts.append(f'<g class="{"strong" if spot.front else "weak"}"><title>{escape(spot.title)}</title>')
        parts.append(f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="5"/>')
        parts.append(_beside(spot.label, px, py, taken, width) + "</g>")
    return _svg(width, bottom + 44, parts, f"{y_axis} against {x_axis}")


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


def figures(html: str) -> dict[str, str]:
    """Return the figures of a piece of the page as SVG files: a name from heading and label -> the text."""
    found: dict[str, str] = {}
    heading = ""
    for match in _FIGURE.finditer(html):
        if match["svg"] is None:
            heading = match["heading"] or match["summary"] or ""
            continue
        label = _LABEL.search(match["svg"])
        base = name = _slug(" ".join((heading, label[1] if label else "figure")))
        for number in itertools.count(2):
            if name not in found:
                break
            name = f"{base}-{number}"
        found[name] = standalone(match["svg"])
    return found


def standalone(svg: str) -> str:
    """Return an inline figure as an SVG document of its own, in the light colours."""
    size = _SIZE.search(svg)
    width, height = (size[1], size[2]) if size else ("720", "400")
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
    style = f'<style>svg{{font-family:sans-serif}}{RULES}</style><rect width="100%" height="100%" fill="#fff"/>'
    opened, _, rest = svg.removeprefix("<svg ").partition(">")
    # Many programs that read SVG know no variables.
    colours = dict(pair.strip().split(":") for pair in LIGHT.split(";"))
    return _COLOUR.sub(lambda match: colours[match[1]], f"{head}{opened}>{style}{rest}\n")


def _slug(text: str) -> str:
    words = unescape(re.sub(r"<[^>]*>", "", text)).replace("->", "-")
    return re.sub(r"[^A-Za-z0-9.=+-]+", "_", words).strip("_.")[:120] or "figure"


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
