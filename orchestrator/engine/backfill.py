"""What may go ahead of the most urgent job that does not fit yet: only what does not make it later.

EASY backfilling (Lifka 1995): the first job that waits has a start reserved, when enough of those at work should have
ended; others start before it where they should be over by then, or take what it leaves free. Without that, small jobs
would keep the cores apart that a wide one waits for, as long as there are any. A job that is at work for much longer
than expected is given a later end, by doubling (as Tsafrir et al. 2007 correct predictions): else one wrong guess would
keep cores idle as long as it is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from orchestrator.backends.local import Budget
from orchestrator.spec.cell import Resources

Amounts = tuple[float, ...]  # cores, GiB, GPUs

# A job may end at any time until it is at work for this many times what was expected.
LATE = 2.0


@dataclass(slots=True)
class Reservation:
    """The start of a job that waits, in seconds from now, and what is free beside it from then on."""

    seconds: float
    free: Amounts

    def allows(self, seconds: float, wanted: Amounts) -> bool:
        """Say whether a job of so many `seconds` may start now; what it holds beyond the reserved start is taken."""
        if seconds <= self.seconds:
            return True
        left = _less(self.free, wanted)
        if min(left) < 0:
            return False
        self.free = left
        return True


class Backfill:
    """The jobs that were started under a budget, and how long each is expected to take."""

    def __init__(self) -> None:
        # The last stage of a job -> when it began, its seconds, and what it holds.
        self._held: dict[str, tuple[float, float, Amounts]] = {}

    def started(self, last: str, began: float, seconds: float, held: Amounts) -> None:
        """Note a job by its last stage."""
        self._held[last] = began, seconds, held

    def keep(self, at_work: Collection[str]) -> None:
        """Forget the jobs whose last stage is none of those at work."""
        for last in self._held.keys() - at_work:
            del self._held[last]

    def reserve(
        self, asked: Amounts, whole: Amounts, ahead: Sequence[tuple[float, Amounts]], now: float
    ) -> Reservation | None:
        """Return when a job that does not fit `now` should, None where others than those started here hold its place.

        `whole` is what there is, `ahead` are the ends and amounts of jobs that start before it.
        """
        at_work = [*((expected_end(began, seconds, now), held) for began, seconds, held in self._held.values()), *ahead]
        free, found = whole, None
        for end, held in sorted(at_work, reverse=True):  # `free` is what there is from `end` on
            if min(_less(free, asked)) < 0:
                break
            if found is None or end < found[0]:
                found = end, free
            free = _less(free, held)
        if found is None or min(_less(free, asked)) >= 0:
            return None
        start, left = found
        return Reservation(start - now, _less(left, asked))


def expected_end(began: float, seconds: float, now: float) -> float:
    """Return when a job should end that was to take so many `seconds`.

    It ends now, as far as anybody knows, where it is late; from `LATE` times its seconds on these are doubled until
    they reach beyond `now`.
    """
    end = began + seconds
    if now < end:
        return end
    times = (now - began) / seconds if seconds > 0 else 0.0
    return began + seconds * 2.0 ** (math.floor(math.log2(times)) + 1) if times >= LATE else now


def everything(budget: Budget) -> Amounts:
    """Return all that a budget gives."""
    return float(budget.cores), budget.memory_gb, float(budget.gpus)


def amounts(wanted: Resources, budget: Budget) -> Amounts:
    """Return what a job holds of a budget: what is larger than everything runs alone."""
    return tuple(min(float(one), most) for one, most in zip(budget.demand(wanted), everything(budget), strict=True))


def _less(ours: Amounts, theirs: Amounts) -> Amounts:
    return tuple(a - b for a, b in zip(ours, theirs, strict=True))
