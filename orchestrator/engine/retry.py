"""Whether a stage that failed is tried again, when, and with what changed. A pure function of its failures.

A change never touches the bits of the result: more memory, never other threads or batch shapes. A budget counts the
failures since the stage last made progress.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.store.attempts import Failure

LONGEST_DELAY = 60.0


@dataclass(frozen=True, slots=True)
class Rule:
    """`retries`: failures without progress that are tolerated. `outside`: the reason lies outside code and grid, so
    that `moegrid resume` tries again. `delay`: seconds before the first retry, doubled for each further one.
    """

    retries: int
    outside: bool
    delay: float = 0.0
    needs_progress: bool = False
    memory_factor: float = 1.0


RULES: dict[str, Rule] = {
    "preempted": Rule(retries=5, outside=True),
    "killed": Rule(retries=5, outside=True),
    "node_lost": Rule(retries=5, outside=True, delay=1.0),
    "hung": Rule(retries=2, outside=True, delay=1.0),
    "unreachable": Rule(retries=5, outside=True, delay=1.0),
    "corrupt": Rule(retries=3, outside=True),
    "parent_missing": Rule(retries=3, outside=True),  # damaged or collected since it was listed
    "oom": Rule(retries=2, outside=True, memory_factor=2.0),
    "timeout": Rule(retries=1, outside=True, needs_progress=True),
    "disk_full": Rule(retries=0, outside=True),
    "refused": Rule(retries=0, outside=True),
    "source_away": Rule(retries=0, outside=True),
    "numerics": Rule(retries=0, outside=True),
    "code": Rule(retries=0, outside=True),
    "crash": Rule(retries=1, outside=True),
    "nan": Rule(retries=0, outside=False),
    "diverged": Rule(retries=0, outside=False),
    "router_collapsed": Rule(retries=0, outside=False),
    "source": Rule(retries=0, outside=False),
    "import": Rule(retries=0, outside=False),
    "plugin": Rule(retries=0, outside=False),
    "bad_spec": Rule(retries=0, outside=False),
    "assertion": Rule(retries=0, outside=False),
    "error": Rule(retries=0, outside=False),
}
_UNKNOWN = RULES["error"]


@dataclass(frozen=True, slots=True)
class Decision:
    """`retry` or not; not before `at` (the store's clock); with `memory_factor` times the memory asked for."""

    retry: bool
    at: float = 0.0
    memory_factor: float = 1.0
    reason: str = ""


def rule(kind: str) -> Rule:
    """Return the rule of a failure kind; an unknown kind is not retried."""
    return RULES.get(kind, _UNKNOWN)


def progressed(failure: Failure, before: Failure | None) -> bool:
    """Did this attempt commit a state that the attempt before it had not reached?"""
    return bool(failure.state) and (before is None or failure.state != before.state)


def decide(failures: Sequence[Failure]) -> Decision:
    """Decide from all failures of one stage that are not pardoned, oldest first."""
    if not failures:
        return Decision(True)
    last = failures[-1]
    fruitless = 0
    for index in range(len(failures) - 1, -1, -1):
        fruitless += 1
        if progressed(failures[index], failures[index - 1] if index else None):
            break
    advanced = progressed(last, failures[-2] if len(failures) > 1 else None)
    policy = rule(last.kind)
    times = f", {fruitless} times without progress" if fruitless > 1 else ""
    reason = f"{last.kind}: {last.message}{times}"
    if fruitless > policy.retries or (policy.needs_progress and not advanced):
        return Decision(False, reason=reason)
    memory = policy.memory_factor ** sum(failure.kind == "oom" for failure in failures[-fruitless:])
    delay = min(policy.delay * 2 ** (fruitless - 1), LONGEST_DELAY)
    return Decision(True, at=last.time + delay, memory_factor=memory, reason=reason)


def pardoned(failure: Failure, *, retry: str, code: str) -> bool:
    """Does a new `moegrid run` or `resume` try again what ended like this?

    `retry` is `outside` (the default) or `all`. What failed for inside reasons is tried again after the code changed.
    """
    return retry == "all" or rule(failure.kind).outside or (bool(failure.code) and failure.code != code)
