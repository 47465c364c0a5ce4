"""The driver dies, or is refused, at any of its calls: the next one finishes, and nothing is done twice."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.harness import Lab, assert_sound

# Somewhat more calls than an undisturbed run makes; a point beyond the last one disturbs nothing.
POINTS = 96
SAMPLE = (3, 12, 25)


def check(lab: Lab, reference: dict[str, Any], fault: str, *, dies: bool) -> None:
    """One fault, then `resume`: the same results, every stage executed once."""
    code, said = lab.drive(FAULT=fault)
    assert code in ((-9, 0) if dies else (0, 3)), said
    code, said = lab.drive("resume")
    assert code == 0, said
    assert_sound(lab, reference)


def test_the_counted_points_cover_a_whole_run(undisturbed: tuple[dict[str, Any], int]) -> None:
    assert undisturbed[1] <= POINTS


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("point", SAMPLE)
def test_a_driver_killed_at_a_call_loses_and_doubles_nothing(
    lab: Lab, reference: dict[str, Any], point: int, moment: str
) -> None:
    check(lab, reference, f"kill:{point}:{moment}", dies=True)


@pytest.mark.faults
@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("point", [p for p in range(1, POINTS + 1) if p not in SAMPLE])
def test_a_driver_killed_at_any_call_loses_and_doubles_nothing(
    lab: Lab, reference: dict[str, Any], point: int, moment: str
) -> None:
    check(lab, reference, f"kill:{point}:{moment}", dies=True)


@pytest.mark.parametrize("fault", ["refuse:20", "lie:30"])
def test_a_call_that_fails_is_tried_again(lab: Lab, reference: dict[str, Any], fault: str) -> None:
    check(lab, reference, fault, dies=False)


@pytest.mark.faults
@pytest.mark.parametrize("kind", ["refuse", "lie"])
@pytest.mark.parametrize("point", range(1, POINTS + 1, 2))
def test_any_call_that_fails_is_tried_again(lab: Lab, reference: dict[str, Any], point: int, kind: str) -> None:
    check(lab, reference, f"{kind}:{point}", dies=False)
