"""What people read: progress and errors on stderr, answers on stdout; in colour only on a terminal without NO_COLOR."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import TextIO

from orchestrator.ui.typed import as_typed

_CODES = {"red": "31", "green": "32", "yellow": "33", "blue": "34", "cyan": "36", "dim": "2", "bold": "1"}
# Words with the space before them; a number and its unit of time, and two of those, are one word.
_TIME = r"\d+ (?:s|min|h|d)\b"
_WORDS = re.compile(rf"(\s*)(\(?{_TIME}(?: {_TIME})?\S*|\S+)")
_COLOUR = re.compile("\033\\[[0-9]*m")
_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Console:
    """Lines for people."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.is_terminal = self.stream.isatty()
        self.colour = self.is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def print(self, text: str = "") -> None:
        """Write a line; a reader that went away is no error."""
        try:
            print(as_typed(text), file=self.stream, flush=True)
        except BrokenPipeError:
            nothing = open(os.devnull, "w")  # noqa: SIM115 (lives as long as the process)
            # What the interpreter flushes at its end has to go somewhere too.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(nothing.fileno(), self.stream.fileno())
            self.stream = nothing

    def tell(self, text: str) -> None:
        """Write a sentence: what is longer than a line goes on below, indented."""
        for line in wrapped(text, self.width):
            self.print(line)

    @property
    def width(self) -> int:
        """How many characters a line holds: of COLUMNS, else of the terminal, 0 (any number) where there is none."""
        if (told := os.environ.get("COLUMNS", "")).isdecimal() and int(told):
            return int(told)
        return shutil.get_terminal_size().columns if self.is_terminal else 0

    def style(self, text: str, name: str) -> str:
        """Return `text` in a colour, where colours are shown."""
        return f"\033[{_CODES[name]}m{text}\033[0m" if self.colour else text


def wrapped(text: str, width: int) -> list[str]:
    """Return `text` as lines of at most `width` characters (0: any number), broken at spaces, the later ones indented.

    A word that is longer than a line stays whole, as paths and commands must.
    """
    margin = text[: len(text) - len(text.lstrip())]
    lines, line, used = [], margin, len(margin)
    for gap, word in _WORDS.findall(text[len(margin) :]):
        length = len(_COLOUR.sub("", word))
        if width and used + len(gap) + length > width and line.strip():
            lines.append(line)
            line, used, gap = f"{margin}    ", len(margin) + 4, ""
        line, used = f"{line}{gap}{word}", used + len(gap) + length
    return [*lines, line]


def duration(seconds: float) -> str:
    """Return a time span in the two largest units: `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`."""
    whole = int(seconds + 0.5)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 and whole < 600 else "")
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def quantity(value: float) -> str:
    """Return a large number with a unit: `3.9M`."""
    for size, unit in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), width: int = 0) -> list[str]:
    """Return `rows` as lines with aligned columns; those in `right` are right-aligned."""
    return [line for lines in table(rows, right=right, width=width) for line in lines]


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = (), width: int = 0) -> list[list[str]]:
    """Return the lines of each row: columns are aligned, and go below where a line of `width` (0: any) is full.

    A row's later lines are indented. A last column of sentences longer than a line is broken at spaces.
    """
    if not rows:
        return []
    widths = [max(_shown(row[i]) for row in rows) for i in range(len(rows[0]))]
    made = []
    for row in rows:
        told = [c.rjust(w + _hidden(c)) if i in right else c.ljust(w + _hidden(c))
                for i, (c, w) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines = ["    " * bool(first) + "  ".join(told[first:last]).rstrip() for first, last in _grouped(widths, width)]
        made.append([part for line in lines if line.strip() for part in wrapped(line, width)])
    return made


def _grouped(widths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Return which columns stand on a line together: as many as it holds, the first one above the others."""
    found, first, used = [], 0, 0
    for at, own in enumerate(widths):
        sentences = at == len(widths) - 1 and own > width - 4
        if width and at > first and used + 2 + own > width and not sentences:
            found.append((first, at))
            first, used = at, 4 + own
        else:
            used += own + 2 * (at > first)
    return [*found, (first, len(widths))]


def _shown(text: str) -> int:
    """Return how many characters a text takes on a terminal."""
    return len(text) - _hidden(text)


def _hidden(text: str) -> int:
    return sum(map(len, _COLOUR.findall(text)))


def plural(count: int, noun: str) -> str:
    """Return `1 cell`, `3 cells`."""
    return f"{count} {noun}" + ("" if count == 1 else "s")
