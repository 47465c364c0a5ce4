"""The Children's Book Test: ten candidate words for one blank."""

from __future__ import annotations

from typing import Any


def choices(doc: dict[str, Any]) -> list[str]:
    """Return each candidate followed by what comes after the blank."""
    rest = doc["question"].partition("XXXXX")[2]
    return [f"{option}{rest}" for option in doc["options"]]


def target(doc: dict[str, Any]) -> int:
    """Return the index of the right candidate."""
    return int(list(doc["options"]).index(doc["answer"]))
