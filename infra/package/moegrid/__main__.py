"""The command `moegrid`, also as `python -m moegrid`."""

from __future__ import annotations

import sys

from moegrid._home import enter


def main() -> int:
    """Run the command line of the installed parts and return its exit code."""
    enter(first=True)
    from orchestrator.cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
