"""Parts of a task: items whose choices are scored together, or whose answers are generated together."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jobs.evaluate.chunks import Chunk, chunks, outcomes
from jobs.evaluate.harness import Item, Prepared
from jobs.evaluate.judging.responses import GENERATED_ITEMS, generated
from jobs.evaluate.prefix_lm import PrefixLM
from jobs.evaluate.results import Outcome, Scored


class ScoredPart:
    """Some items of a task whose choices are scored."""

    def __init__(self, chunk: Chunk, lm: PrefixLM) -> None:
        self.name, self.items = chunk.name, chunk.items
        self.compute: Callable[[], dict[str, Any]] = partial(chunk.scored, lm)
        self._chunk = chunk

    def scored(self, value: Mapping[str, Any]) -> list[Scored]:
        return outcomes(self._chunk, value["answers"])

    def responses(self, value: Mapping[str, object]) -> list[dict[str, Any]]:
        return []


class GeneratedPart:
    """Some items of a task whose answers are generated."""

    def __init__(self, task: Prepared, items: Sequence[Item], number: int, lm: PrefixLM, new_tokens: int) -> None:
        self.items = tuple(items)
        self._task = task
        self._contexts = [item.requests[0][0] for item in items]
        asked = hashlib.sha256("\0".join(self._contexts).encode()).hexdigest()
        self.name = f"{task.name}-{number}-{asked[:12]}"
        settings = {**(task.generation or {}), "max_gen_toks": new_tokens}
        self.compute: Callable[[], dict[str, Any]] = lambda: {"texts": generated(lm, self._contexts, settings)}

    def scored(self, value: Mapping[str, Any]) -> list[Scored]:
        rows = []
        for item, text in zip(self.items, value["texts"], strict=True):
            right = self._task.match(item, text)
            rows.append(Scored(self._task.name, item.id, 0, Outcome((), right, right, math.nan)))
        return rows

    def responses(self, value: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [
            {"task": self._task.name, "item": item.id, "label": "", "prompt": context, "response": text}
            for item, context, text in zip(self.items, self._contexts, value["texts"], strict=True)
        ]


def parts_of(task: Prepared, lm: PrefixLM, new_tokens: int) -> Sequence[ScoredPart | GeneratedPart]:
    """Return the items of a task in parts that are scored, or answered, and stored together."""
    if task.generation is None:
        return [ScoredPart(chunk, lm) for chunk in chunks(task)]
    starts = range(0, len(task.items), GENERATED_ITEMS)
    return [
        GeneratedPart(task, task.items[at : at + GENERATED_ITEMS], number, lm, new_tokens)
        for number, at in enumerate(starts)
    ]
