"""Which baseline a setting may be compared with: one that differs from it in a single declared factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar


class Named(Protocol):
    """A setting: its factors, without the seed."""

    @property
    def factors(self) -> Mapping[str, object]: ...


S = TypeVar("S", bound=Named)


def comparable(setting: S, settings: Sequence[S], baseline: Mapping[str, object]) -> tuple[S | None, str]:
    """Return the baseline that `setting` differs from in one declared factor, or None and the reason."""
    if not baseline:
        return None, "the grid names no baseline"
    wanted = {name: str(value) for name, value in baseline.items()}
    best: tuple[S, list[str]] | None = None
    for other in settings:
        if any(str(other.factors.get(name, "")) != value for name, value in wanted.items()):
            continue
        different = [n for n, v in setting.factors.items() if str(other.factors.get(n, "")) != str(v)]
        if best is None or len(different) < len(best[1]):
            best = (other, different)
    if best is None:
        return None, "the baseline is not in this grid"
    if best[0] is setting:
        return None, "this is the baseline"
    if not _one_axis(setting, *best, settings):
        return None, f"it differs from the baseline in more than one factor: {', '.join(best[1])}"
    return best[0], ""


def _one_axis(setting: S, baseline: S, different: Sequence[str], settings: Sequence[S]) -> bool:
    """Return whether the factors in which two settings differ are one: a single one, or always moved together.

    They are not if another setting lies between the two, or has one of these values with others of the rest.
    """
    if len(different) == 1:
        return True

    def between(other: S) -> bool:
        ours = [other.factors.get(name) == setting.factors.get(name) for name in different]
        theirs = [other.factors.get(name) == baseline.factors.get(name) for name in different]
        return all(map(any, zip(ours, theirs, strict=True))) and any(ours) and any(theirs)

    def determines(name: str) -> bool:
        alike = [s for s in settings if s.factors.get(name) == setting.factors.get(name)]
        return all(s.factors.get(other) == setting.factors.get(other) for s in alike for other in different)

    rest = [other for other in settings if other is not setting and other is not baseline]
    return any(map(determines, different)) and not any(map(between, rest))
