"""What a running evaluation has already scored, chunk by chunk, so that a killed one goes on where it was.

`partial/<stage>/<chunk>.json` is put-if-absent: an item is scored once, whoever scores it. The committed artifact is
the truth; these objects are deleted after the commit and may be deleted at any time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.context import StageContext


class Ledger:
    """The scored chunks of one evaluation stage."""

    def __init__(self, context: StageContext) -> None:
        self._context = context
        self._objects = context.store.objects
        self._prefix = f"partial/{context.stage}"
        self._known = {entry.path for entry in self._objects.list(f"{self._prefix}/")}
        self.reused = 0

    def once(self, chunk: str, compute: Callable[[], Any]) -> Any:
        """Return the JSON value of `chunk`: what was stored, else `compute()`, stored before it is returned."""
        path = f"{self._prefix}/{chunk}.json"
        stored = self._objects.get(path) if path in self._known else None
        if stored is not None:
            self.reused += 1
            return json.loads(stored)
        value = json.loads(json.dumps(compute()))
        self._context.check()
        if not self._objects.create(path, json.dumps(value).encode()):
            winner = self._objects.get(path)
            return value if winner is None else json.loads(winner)
        return value

    def clear(self) -> None:
        """Delete the chunks: the evaluation is committed."""
        for entry in list(self._objects.list(f"{self._prefix}/")):
            self._objects.delete(entry.path)
