"""A freeze schedule says for every step of a run what is frozen, once."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.spec.schedule import freeze_phases, parse_freeze

words = st.sampled_from(("none", "router", "expert"))


@st.composite
def schedules(draw: st.DrawFn) -> tuple[str, list[tuple[str, Fraction]]]:
    """A schedule as a grid writes it, with its words and exact starts."""
    if draw(st.booleans()):
        named = draw(st.lists(words, min_size=1, max_size=6))
        return "->".join(named), [(word, Fraction(i, len(named))) for i, word in enumerate(named)]
    hundredths = sorted({0, *draw(st.sets(st.integers(1, 99), max_size=5))})
    parts = [(draw(words), Fraction(n, 100)) for n in hundredths]
    return "->".join(f"{word}@{float(start)}" for word, start in parts), parts


@given(schedules(), st.integers(0, 400))
def test_every_step_has_the_word_of_the_last_phase_that_began(
    case: tuple[str, list[tuple[str, Fraction]]], steps: int
) -> None:
    text, parts = case
    phases = freeze_phases(text, steps)
    covered = [(step, phase.frozen) for phase in phases for step in range(phase.start, phase.stop)]
    expected = []
    for step in range(steps):
        # A phase begins at the step nearest to its share of the run, half a step later rather than earlier.
        began = [word for word, start in parts if math.floor(start * steps + Fraction(1, 2)) <= step]
        expected.append((step, "" if began[-1] == "none" else began[-1]))
    assert covered == expected
    assert all(a.frozen != b.frozen for a, b in itertools.pairwise(phases))


@given(st.text(alphabet="neroutxp@->.0123456789 ", max_size=30))
def test_any_text_is_a_schedule_or_an_error_with_its_reason(text: str) -> None:
    try:
        parsed = parse_freeze(text)
    except ValueError as error:
        assert "freeze schedule" in str(error)  # noqa: PT017 (any text may also be a schedule)
    else:
        assert parsed[0][1] == 0
        assert all(0 <= start < 1 for _, start in parsed)
