"""Lengths of a training phase in units: `200`, `3.5M tokens`, `10k sequences`, `3 epochs`, as whole optimizer steps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from orchestrator.errors import did_you_mean
from orchestrator.files.problems import Mistake
from orchestrator.spec.cell import TrainSpec

UNITS = ("steps", "sequences", "tokens", "epochs")
_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_QUANTITY = re.compile(r"^([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([kKMBGT]?)\s*([A-Za-z]+)?$")
EXAMPLES = "write 200, 200 steps, 10k sequences, 3.5M tokens or 3 epochs"


@dataclass(frozen=True, slots=True)
class Length:
    """An amount in `unit`; `text` is how it was written."""

    amount: float
    unit: str
    text: str

    def steps(self, train: TrainSpec, epoch: int = 0) -> int:
        """Return the optimizer steps of this length under `train`'s batch, rounded up to a whole step.

        `epoch` is how many examples one has. Raises Mistake when the length is under one step.
        """
        sequences = train.micro_batch * train.accumulation
        if self.unit == "steps":
            exact = self.amount
        elif self.unit == "sequences":
            exact = self.amount / sequences
        elif self.unit == "tokens":
            exact = self.amount / (sequences * train.sequence_length)
        else:
            exact = self.amount * epoch / sequences
        # 1e-9 forgives the float error of an amount that is a whole number of steps.
        steps = math.ceil(exact - 1e-9)
        if steps < 1:
            raise Mistake(f"{self.text!r} is less than one optimizer step", EXAMPLES)
        return steps


def parse_length(value: object) -> int | Length:
    """Return whole steps, or a `Length` still to be converted. Raises Mistake."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise Mistake(f"{value!r} is not a length", EXAMPLES)
    if isinstance(value, int):
        return value
    match = _QUANTITY.match(str(value).strip())
    if not match:
        raise Mistake(f"{value!r} is not a length", EXAMPLES)
    number, prefix, unit = match.groups()
    unit = unit or "steps"
    known = {**{name: name for name in UNITS}, **{name[:-1]: name for name in UNITS}}
    if unit not in known:
        raise Mistake(f"{value!r} has an unknown unit {unit!r}", did_you_mean(unit, UNITS, "units"))
    amount = float(number.replace("_", "")) * _PREFIXES[prefix]
    if known[unit] != "steps":
        return Length(amount, known[unit], str(value))
    if amount != int(amount):
        raise Mistake(f"{value!r} is not a whole number of steps", EXAMPLES)
    return int(amount)
