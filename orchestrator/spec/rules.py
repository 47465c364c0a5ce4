"""Bounds and choices of a cell's fields: each stands beside its field."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from orchestrator.errors import MoegridError, did_you_mean
from orchestrator.files.problems import Mistake
from orchestrator.registry import Registry


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value may be, beyond its type. `above` is an exclusive lower bound; `refused` says why of a near miss.

    `names` are those of a registry: ours, and those that an installed package or a plugin file provides.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: tuple[Any, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    names: Registry[Any] | None = None

    def check(self, value: Any) -> None:
        """Raise Mistake when `value` breaks the rule."""
        if value in self.refused:
            offered = self.names.names() if self.names is not None else self.choices
            raise Mistake(f"{value!r} is not offered: {self.refused[value]}", f"one of {', '.join(offered)}")
        if self.choices and value not in self.choices:
            raise Mistake(f"must be one of {', '.join(map(repr, self.choices))}, not {value!r}", self._near(value))
        if self.names is not None:
            self._named(self.names, value)
        if self.low is not None and value < self.low:
            raise Mistake(f"must be at least {self.low:g}, not {value:g}")
        if self.above is not None and value <= self.above:
            raise Mistake(f"must be above {self.above:g}, not {value:g}")
        if self.high is not None and value > self.high:
            raise Mistake(f"must be at most {self.high:g}, not {value:g}")

    def _named(self, names: Registry[Any], value: Any) -> None:
        try:
            found = names.find(value)
        except MoegridError as error:  # its package is broken, or two provide it
            raise Mistake(": ".join(filter(None, (error.error, error.cause))), error.hint) from error
        if found is None:
            raise Mistake(f"must be one of {', '.join(map(repr, names.names()))}, not {value!r}", names.near(value))

    def _near(self, value: object) -> str:
        hint = did_you_mean(value, self.choices)
        return hint if hint.startswith("did you mean") else ""


def one_of(*choices: str) -> Rule:
    return Rule(choices=choices)


POSITIVE = Rule(low=1)
NATURAL = Rule(low=0)
NOT_NEGATIVE = Rule(low=0)
ABOVE_ZERO = Rule(above=0)
FRACTION = Rule(low=0, high=1)

SEED = Rule(low=0, high=2**31 - 1)


@cache
def rules_of(owner: type) -> Mapping[str, Rule]:
    """Return the rules of a dataclass's fields, as they stand beside them: `lr: Annotated[float, ABOVE_ZERO]`."""
    hints = typing.get_type_hints(owner, include_extras=True)
    found = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: rule for name, notes in found.items() for rule in notes if isinstance(rule, Rule)}


# The phases of training, in their order; those of models that see; of these the one that experts begin with.
PHASES = ("pretrain", "finetune", "align", "warm", "instruct")
SEEING = PHASES[2:]
UPCYCLED = SEEING[-1]
STAGE_RESOURCES = (*PHASES, "evaluate", "prepare")
