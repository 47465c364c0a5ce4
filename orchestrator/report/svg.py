"""The parts of an SVG figure: scales, axes, legends, colours, and figures as files of their own.

No library: a figure is text in the page. Colours come from the page, so they follow light and dark. A figure keeps its
numbers in `<title>` elements (tooltips, and text for a screen reader); `data-` attributes let the page's script read
values off the axes.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape, unescape

CHARACTER = 7.2  # width of a letter, about
LINE = 14  # from one line of a text to the next
DASHED = ' stroke-dasharray="6 3"'
COLOURS = 12  # CSS variables --c0 .. --c11 of the page
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
.cursor{stroke:var(--quiet);stroke-width:1}.key.off{opacity:.35}
.square{stroke:var(--line);stroke-width:.5}.bar rect{fill:var(--c0)}
.marked rect{fill:var(--c0);stroke:var(--c1);stroke-width:3}
"""
_FIGURE = re.compile(
    r"<h3>(?P<heading>.*?)</h3>|<summary>(?P<summary>.*?)</summary>|(?P<svg><svg .*?</svg>)", re.DOTALL
)
# What a line of a name may end with: a space, or a sign between its words.
_PARTS = re.compile(r"[^\s/_,;:=+>-]*[\s/_,;:=+>-]*")
_COLOUR = re.compile(r"var\((--\w+)\)")
_LABEL = re.compile(r'aria-label="([^"]*)"')
_SIZE = re.compile(r'viewBox="0 0 (\d+) (\d+)"')


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


def figure(
    width: float, height: float, parts: Sequence[str], label: str, *, fixed: bool = False, data: str = ""
) -> str:
    """Return the parts as a figure of the page; `fixed` ones are not drawn larger, `data` are further attributes."""
    style = f' style="min-width:{min(width, 560):.0f}px;max-width:{width:.0f}px"' if fixed else ""
    return (
        f'<div class="figure"><svg viewBox="0 0 {width:.0f} {height:.0f}" role="img"{style}'
        f'{" " * bool(data)}{data} aria-label="{escape(label)}">{"".join(parts)}</svg></div>'
    )


def scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """Return the map of low..high onto start..stop; where both are one value, of a range around it."""
    if not high > low:
        low, high = low - (abs(low) * 0.05 or 0.5), high + (abs(high) * 0.05 or 0.5)
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def x_axis(x: Callable[[float], float], low: float, high: float, top: float, bottom: float, label: str) -> str:
    """Return the horizontal axis with its ticks and name."""
    parts = [f'<line class="axis" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{bottom}" y2="{bottom}"/>']
    for tick in ticks(low, high):
        parts.append(
            f'<line class="grid" data-vx="{tick:g}" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{top}" y2="{bottom}"/>'
        )
        parts.append(
            f'<text class="small" data-vx="{tick:g}" x="{x(tick):.1f}" y="{bottom + 14}" '
            f'text-anchor="middle">{short(tick)}</text>'
        )
    middle = (x(low) + x(high)) / 2
    return "".join([*parts, f'<text x="{middle:.1f}" y="{bottom + 30}" text-anchor="middle">{escape(label)}</text>'])


def y_axis(y: Callable[[float], float], low: float, high: float, left: float, right: float, label: str) -> str:
    """Return the vertical axis with its ticks and, above it, its name."""
    parts = []
    for tick in ticks(low, high):
        parts.append(
            f'<line class="grid" data-vy="{tick:g}" x1="{left}" x2="{right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        )
        parts.append(
            f'<text class="small" data-vy="{tick:g}" x="{left - 6}" y="{y(tick) + 4:.1f}" '
            f'text-anchor="end">{short(tick)}</text>'
        )
    return "".join([*parts, f'<text class="small" x="{left - 56}" y="11">{escape(label)}</text>'])


def short(value: float) -> str:
    """Return a tick's number, short."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-4):
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:.6g}"


def text_width(texts: Iterable[str]) -> float:
    """Return about how wide the longest of the texts is drawn."""
    return CHARACTER * max((len(text) for text in texts), default=0)


def legend(names: Sequence[str], left: float, top: float, right: float) -> tuple[str, float]:
    """Return a key of coloured lines for `names`, in as many columns as hold the longest, and its height.

    A name that is wider than the figure goes on in the next line.
    """
    room = right - left - 28
    longest = min(text_width(names), room)
    columns = max(1, min(len(names), int((right - left) // (longest + 44))))
    wide = (right - left) / columns
    parts = []
    y = top + 12.0
    for i, name in enumerate(names):
        x = left + (i % columns) * wide
        dashed = DASHED if i >= COLOURS else ""
        broken = lines_of(name, room)
        parts.append(
            f'<g class="key" data-name="{escape(name)}" style="color:var(--c{i % COLOURS})">'
            f"<title>{escape(name)}</title>"
            f'<line class="curve" x1="{x:.1f}" x2="{x + 22:.1f}" y1="{y - 4}" y2="{y - 4}"{dashed}/>'
            f"{text(broken, x + 28, y)}</g>"
        )
        # Where a name takes several lines there is one column.
        y += (20 + LINE * (len(broken) - 1)) * (i % columns == columns - 1 or i == len(names) - 1)
    return "".join(parts), y - top - 4


def lines_of(name: str, room: float) -> list[str]:
    """Return a name in lines no wider than `room`: broken at spaces, else behind a sign, else anywhere.

    Nothing of it is left out: on a phone there are no tooltips.
    """
    most = max(1, int(room / CHARACTER))
    lines, line = [], ""
    for part in _PARTS.findall(name):
        if line and len(line) + len(part.rstrip()) > most:
            lines.append(line.rstrip())
            line = ""
        line += part
        while len(line.rstrip()) > most:
            lines.append(line[:most])
            line = line[most:]
    return [*lines, line.rstrip()] if line.strip() or not lines else lines


def text(lines: Sequence[str], x: float, y: float, attributes: str = "") -> str:
    """Return a text whose lines stand below each other, the first one on `y`; `attributes` as in SVG."""
    if len(lines) == 1:
        return f'<text x="{x:.1f}" y="{y:.6g}"{attributes}>{escape(lines[0])}</text>'
    spans = (f'<tspan x="{x:.1f}" y="{y + LINE * i:.6g}">{escape(line)}</tspan>' for i, line in enumerate(lines))
    return f"<text{attributes}>{''.join(spans)}</text>"
