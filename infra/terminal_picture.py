"""Draws README's picture of a terminal: runs a grid in a new store, and writes what it says as SVG.

python infra/terminal_picture.py docs/pictures/terminal.svg [GRID]
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from html import escape
from pathlib import Path

COLUMNS = 118
LETTER, LINE, MARGIN = 7.3, 16, 12  # of a monospaced face of 12 pixels
PLAIN, COMMAND, DONE = "#d7dce4", "#7fb4ff", "#8bd49c"


def draw(lines: Sequence[str], title: str) -> str:
    """Return lines of a terminal as an SVG: commands blue, what is done or to be run green."""
    width, height = round(2 * MARGIN + LETTER * COLUMNS), LINE * len(lines) + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" rx="6" fill="#1b1f27"/>',
    ]
    for number, line in enumerate(lines, 1):
        y = MARGIN + LINE * number - 4
        parts.append(f'<text x="{MARGIN}" y="{y}" fill="{_colour(line)}" xml:space="preserve">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _colour(line: str) -> str:
    if line.startswith("$ "):
        return COMMAND
    return DONE if line.startswith("  + run ") or "  done  " in line else PLAIN


def main(target: Path, grid: str = "quickstart") -> int:
    """Run the grid as a newcomer does, its words passed on, and draw them; a run that fails draws nothing."""
    command = ["moegrid", "run", grid]
    lines = [f"$ {' '.join(command)}"]
    # As with the environment activated, so that commands in what it says are as one types them.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PATH": path, "COLUMNS": str(COLUMNS), "MOEGRID_STORE": "runs"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line.rstrip())
        if code := process.wait():
            return code
    target.write_text(draw(lines, f"{' '.join(command)} in a terminal"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
