"""Works that are made many times over and differ in one parent alone: their canonical text is written once.

A grid of ten thousand cells asks each of its states the same questions. The key of such an evaluation is the sha256
of one text in which only the state's key differs, so all before it is hashed once.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import replace

from orchestrator.spec.identity import canonical_text, science_text
from orchestrator.spec.work import Conditions, EvaluateWork, GenerateWork, JudgeWork

# Stands for the parent in the text; no grid can have written it.
_OPEN = f"open-{secrets.token_hex(16)}"


class Form:
    """An evaluation, generation or judgement whose state (of a judge: whose responses) is left open.

    `shown` are the held-out questions about pictures that it reads, as far as they are known beforehand.
    """

    __slots__ = ("_after", "_begun", "_parents", "shown", "work")

    def __init__(self, work: EvaluateWork | GenerateWork | JudgeWork, shown: int = 0) -> None:
        """`work` with any state or responses: they are replaced."""
        self.work, self.shown = _filled(work, ""), shown
        opened = _filled(work, _OPEN)
        before, _, self._after = science_text(*opened.content()).partition(_OPEN)
        if _OPEN in self._after or not self._after:
            raise AssertionError(f"a {work.kind} stage does not name what it reads once")
        self._begun = hashlib.sha256(before.encode())
        self._parents = tuple(dict.fromkeys(opened.parents.values()))

    def key(self, read: str) -> str:
        """Return the key of the work that reads the artifact `read`."""
        whole = self._begun.copy()
        whole.update((read + self._after).encode())
        return whole.hexdigest()

    def parents(self, read: str) -> tuple[str, ...]:
        """Return the keys that the work needs."""
        return tuple([read if parent == _OPEN else parent for parent in self._parents])

    def filled(self, read: str) -> EvaluateWork | GenerateWork | JudgeWork:
        """Return the work that reads the artifact `read`."""
        return _filled(self.work, read)


def _filled(work: EvaluateWork | GenerateWork | JudgeWork, read: str) -> EvaluateWork | GenerateWork | JudgeWork:
    if isinstance(work, JudgeWork):
        return replace(work, responses=read)
    return replace(work, state=read)


class OpenConditions:
    """Conditions of training whose seed is left open."""

    __slots__ = ("_after", "_before", "conditions")

    def __init__(self, conditions: Conditions) -> None:
        """`conditions` with any seed: it is replaced."""
        self.conditions = conditions
        # What stands before the seed are a number and the name of a phase.
        mark = f'"seed":{canonical_text(conditions.seed)},'
        self._before, _, self._after = conditions.text().partition(mark)
        if not self._after:
            raise AssertionError("conditions of training do not name their seed")

    def digest(self, seed: int) -> str:
        """Return the digest of the conditions with this seed."""
        text = f'{self._before}"seed":{canonical_text(seed)},{self._after}'
        return hashlib.sha256(text.encode()).hexdigest()

    def filled(self, seed: int) -> Conditions:
        """Return the conditions with this seed."""
        return replace(self.conditions, seed=seed)
