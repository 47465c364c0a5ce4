"""Weights & Biases as the tracker: `--tracking wandb://[ENTITY/]PROJECT`.

WANDB_MODE=offline keeps runs on this machine. Its key and mode are wandb's own (WANDB_API_KEY, WANDB_MODE, WANDB_DIR).
Notes of what was written lie in WANDB_DIR, so that a run that is published again, from this machine, gets only what is
new.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

from orchestrator.tracking.noted import Note, NotedTracker, reached
from orchestrator.tracking.tracker import FAILED, FINISHED, KILLED, Point

STEP = "step"


class WandbTracker(NotedTracker):
    """One run of the project for each of ours, grouped by grid; a series' own step is its axis."""

    def __init__(self, uri: str) -> None:
        target = uri.removeprefix("wandb://").strip("/")
        self._entity, _, self._project = target.rpartition("/")
        self._runs: dict[str, Any] = {}
        super().__init__(Path(os.environ.get("WANDB_DIR") or ".") / "wandb-notes" / (target or "moegrid"))

    def show(self, note: Note, points: Sequence[Point]) -> None:
        """Log the points, those of one step together."""
        run = self._run(note)
        for step, at in groupby(points, key=lambda point: point.step):
            values = {point.metric: point.value for point in at}
            reached(partial(run.log, {STEP: step, **values}), "wandb")

    def describe(self, note: Note) -> None:
        """Set params and tags as the run's configuration."""
        values = {**note["params"], **note["tags"]}
        reached(lambda: self._run(note).config.update(values, allow_val_change=True), "wandb")

    def close(self, note: Note) -> None:
        """End the run when it has ended."""
        if note["status"] in (FINISHED, FAILED, KILLED) and (run := self._runs.pop(note["id"], None)) is not None:
            code = 0 if note["status"] == FINISHED else 1
            reached(lambda: run.finish(exit_code=code), "wandb")

    def _run(self, note: Note) -> Any:
        if note["id"] not in self._runs:
            import wandb

            def begin() -> None:
                run = wandb.init(
                    project=self._project or "moegrid",
                    entity=self._entity or None,
                    id=note["id"],
                    name=note["name"],
                    group=self.experiment,
                    resume="allow",
                    reinit="create_new",
                    settings=wandb.Settings(silent=True),
                )
                run.define_metric("*", step_metric=STEP)
                self._runs[note["id"]] = run

            reached(begin, "wandb")
        return self._runs[note["id"]]
