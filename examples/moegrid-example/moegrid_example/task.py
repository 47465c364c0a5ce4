"""A task: its items are checked while a grid is read."""

from __future__ import annotations

from typing import Any


def check(row: dict[str, Any]) -> None:
    """Refuse an item without a right answer."""
    if not 0 <= row["right"] < len(row["options"]):
        raise ValueError(f"has {len(row['options'])} options, and {row['right']} as the right one")
