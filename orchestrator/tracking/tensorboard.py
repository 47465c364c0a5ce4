"""TensorBoard as the tracker: `--tracking tensorboard://FOLDER`, a folder of event files for each run."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from orchestrator.tracking.noted import Note, NotedTracker, folder_of, reached
from orchestrator.tracking.tracker import Point

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter


class TensorBoardTracker(NotedTracker):
    """FOLDER/<grid>/<run>-<id>/: scalars of every series and result, and a text of the run's params and tags."""

    def __init__(self, uri: str) -> None:
        super().__init__(folder_of(uri, "tensorboard"))

    def show(self, note: Note, points: Sequence[Point]) -> None:
        """Add the points as scalars, with their own times."""

        def add(writer: SummaryWriter) -> None:
            for point in points:
                writer.add_scalar(point.metric, point.value, point.step, walltime=point.time or None)

        self._written(note, add)

    def describe(self, note: Note) -> None:
        """Add the params and tags as a table of text."""
        rows = {**note["params"], **note["tags"], "status": note["status"]}
        table = "\n".join(f"| {name} | {str(text).replace('|', '/')} |" for name, text in sorted(rows.items()))
        self._written(note, lambda writer: writer.add_text("run", f"| name | value |\n|---|---|\n{table}", 0))

    def _written(self, note: Note, add: Callable[[SummaryWriter], object]) -> None:
        from tensorboardX import SummaryWriter

        name = re.sub(r"[^\w.=-]+", "_", note["name"])[:80]

        def write() -> None:
            folder = self.folder / self.experiment / f"{name}-{note['id'][:6]}"
            # Files of one second would have one name, and replace one another.
            with SummaryWriter(str(folder), filename_suffix=f".{uuid.uuid4().hex}") as writer:
                add(writer)

        reached(partial(write), f"TensorBoard's folder {self.folder}")
