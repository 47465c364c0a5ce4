"""Answers of simulations, kept in the user's cache by what was asked."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator import resources
from orchestrator.plan.shapes import Question, digest_of


@dataclass(frozen=True, slots=True)
class Held:
    """The most bytes a rank holds at one time, by kind."""

    bytes: int
    kinds: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """What `jobs.simulate.answer.Answer` tells: peaks by moment, host bytes, and what one step or pass does."""

    parameters: int = 0
    moments: Mapping[str, Held] = field(default_factory=dict)
    host: int = 0
    operations: Sequence[tuple[int, int, str, int]] = ()  # FLOPs, bytes, type, how often
    collectives: Sequence[tuple[str, int, int]] = ()  # name, bytes of the whole buffer, how often
    looks: int = 0  # at values, for which the host waits
    tokens: int = 0
    failed: str = ""

    @property
    def peak(self) -> int:
        """The most bytes of the device at any moment."""
        return max((held.bytes for held in self.moments.values()), default=0)

    @property
    def flops(self) -> int:
        """FLOPs of the matrix products."""
        return sum(flops * times for flops, _, _, times in self.operations)


def read_answer(document: Mapping[str, object]) -> Answer:
    """Return an answer from its JSON types."""
    fields = dict(document)
    moments = fields.get("moments", {})
    assert isinstance(moments, Mapping)
    fields["moments"] = {name: Held(**held) for name, held in moments.items()}
    for name in ("operations", "collectives"):
        rows = fields.get(name, [])
        assert isinstance(rows, list)
        fields[name] = tuple(map(tuple, rows))
    return Answer(**fields)  # type: ignore[arg-type]


def known_answer(question: Question) -> Answer | None:
    """Return the answer that is kept, None when there is none yet."""
    try:
        document = json.loads((resources.cache_root() / "simulations" / f"{digest_of(question)}.json").read_bytes())
    except (OSError, ValueError):
        return None
    return read_answer(document)


def keep_answer(question: Question, document: Mapping[str, object]) -> None:
    """Keep an answer; a cache that cannot be written to only costs the next simulation's time."""
    folder = resources.cache_root() / "simulations"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            json.dump(document, file)
        os.replace(file.name, folder / f"{digest_of(question)}.json")
