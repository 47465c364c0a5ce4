"""What a simulation found, as JSON types."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from jobs.simulate.ledger import Operation, Peak

# Operations that move fewer bytes than this and multiply nothing are added up: none of them takes time of its own.
SMALL = 1 << 16


@dataclass(slots=True)
class Answer:
    """Peaks of one rank by moment, host bytes beside the device's, and what one step, or pass, does."""

    parameters: int = 0
    moments: dict[str, Peak] = field(default_factory=dict)
    host: int = 0
    operations: Counter[Operation] = field(default_factory=Counter)
    collectives: Counter[tuple[str, int]] = field(default_factory=Counter)
    looks: int = 0
    tokens: int = 0  # of the pass whose operations are counted

    def add(self, moment: str, peak: Peak) -> None:
        """Note a peak of a moment, if it is its highest."""
        if moment not in self.moments or peak.total > self.moments[moment].total:
            self.moments[moment] = peak

    def to_json(self) -> dict[str, object]:
        """Return the answer as JSON types (the contract of `orchestrator.plan.simulated`)."""
        operations = sorted((op.flops, op.bytes, op.dtype, n) for op, n in self.operations.items())
        return {
            "parameters": self.parameters,
            "moments": {name: {"bytes": peak.total, "kinds": dict(peak.kinds)} for name, peak in self.moments.items()},
            "host": self.host,
            "operations": [list(operation) for operation in operations],
            "collectives": [[name, size, n] for (name, size), n in sorted(self.collectives.items())],
            "looks": self.looks,
            "tokens": self.tokens,
        }


def counted(answer: Answer) -> Answer:
    """Return the answer with its small operations added up."""
    kept: Counter[Operation] = Counter()
    small: Counter[str] = Counter()
    for operation, times in answer.operations.items():
        if operation.flops or operation.bytes >= SMALL:
            kept[operation] += times
        else:
            small[operation.dtype] += operation.bytes * times
    kept.update({Operation(0, size, dtype): 1 for dtype, size in small.items() if size})
    answer.operations = kept
    return answer
