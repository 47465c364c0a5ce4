"""What is written about an attempt: its names, its failure, and the documents of its batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one attempt did not finish one stage. `state` is the last state the attempt committed, `step` where it was.

    `artifact` names the damaged artifact of a `corrupt` failure; `code` is the digest of the code that ran.
    """

    stage: str
    attempt: str
    kind: str
    message: str
    hint: str = ""
    exit_code: int | None = None
    artifact: str = ""
    state: str = ""
    step: int = 0
    code: str = ""
    time: float = 0.0
    tail: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Failure:
        return cls(**{field.name: data[field.name] for field in fields(cls) if field.name in data})

    @classmethod
    def parse(cls, data: Mapping[str, object]) -> Failure | None:
        """Return the failure, None when `data` is no record of one (damaged)."""
        texts = ("stage", "attempt", "kind", "message", "hint", "artifact", "state", "code", "tail")
        numbers = ("step", "time", "exit_code")
        if not all(isinstance(data.get(name, ""), str) for name in texts) or not {"kind", "message"} <= data.keys():
            return None
        if not all(isinstance(data.get(name), (int, float, type(None))) for name in numbers):
            return None
        return cls.from_json(data)


def driver_of(attempt: str) -> str:
    """Return the id of the driver that made an attempt `<driver>-<batch>-<index>`."""
    return attempt.rsplit("-", 2)[0]


def batch_of(attempt: str) -> str:
    """Return the batch of an attempt."""
    return attempt.rsplit("-", 1)[0]
