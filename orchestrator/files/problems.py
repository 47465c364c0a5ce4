"""Collect everything that is wrong with a grid, so that it is reported at once."""

from __future__ import annotations

from typing import NamedTuple

from orchestrator.errors import GridError, Problem


class Mistake(ValueError):
    """One wrong value: the reason, and the remedy where there is one; a `Problem` once its place is known.

    `named`: the message says itself what the value is of.
    """

    def __init__(self, message: str, hint: str = "", *, named: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.named = named


class Fault(NamedTuple):
    """What is wrong with one field of a dataclass (`parameters.noise`; "" = with several), and the remedy."""

    field: str
    message: str
    hint: str = ""


class Problems:
    """A list of problems without repetitions."""

    def __init__(self) -> None:
        self.found: dict[Problem, None] = {}

    def add(self, message: str, where: str = "", key: str = "", hint: str = "") -> None:
        self.found[Problem(message, where, key, hint)] = None

    def raise_if_any(self) -> None:
        """Raise GridError with all problems found so far."""
        if self.found:
            raise GridError(self.found)

    def __bool__(self) -> bool:
        return bool(self.found)


def brief(value: object) -> str:
    """Return `value` for a message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
