"""A tracker: every run as one JSON file in the folder that `--tracking lines://FOLDER` names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from moegrid.extend import KEY_TAG, Recorded


class Lines:
    """What moegrid asks of a tracker; what it holds is compared with the store, and only what is missing is written."""

    def __init__(self, uri: str) -> None:
        self.folder = Path(uri.removeprefix("lines://") or "lines")
        self.folder.mkdir(parents=True, exist_ok=True)

    def open(
        self, experiment: str, description: str, tags: Mapping[str, str], columns: Iterable[str]
    ) -> dict[str, Recorded]:
        """Return what is recorded of an experiment's runs, by key."""
        found = {}
        for path in self.folder.glob(f"{experiment}.*.json"):
            run = json.loads(path.read_text())
            last = {metric: max(map(int, steps)) for metric, steps in run["points"].items()}
            found[run["tags"][KEY_TAG]] = Recorded(path.name, run["tags"], set(run["params"]), last, run["status"])
        self._experiment = experiment
        return found

    def create(self, run: Any, parent: str) -> Recorded:
        tags = {KEY_TAG: run.key}
        name = hashlib.sha256(run.key.encode()).hexdigest()[:16]
        recorded = Recorded(f"{self._experiment}.{name}.json", dict(tags), set(), {}, run.status)
        empty = {"name": run.name, "tags": tags, "params": {}, "points": {}, "status": run.status}
        (self.folder / recorded.id).write_text(json.dumps(empty))
        return recorded

    def write(
        self, recorded: Recorded, points: Iterable[Any], params: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        def change(run: dict[str, Any]) -> None:
            for point in points:
                run["points"].setdefault(point.metric, {})[str(point.step)] = point.value
            run["params"].update(params)
            run["tags"].update(tags)

        self._change(recorded, change)

    def remove(self, recorded: Recorded, tags: Iterable[str]) -> None:
        self._change(recorded, lambda run: [run["tags"].pop(tag, None) for tag in tags])

    def steps(self, recorded: Recorded, metric: str) -> set[int]:
        """Return the steps of a series that are recorded."""
        run = json.loads((self.folder / recorded.id).read_text())
        return set(map(int, run["points"].get(metric, {})))

    def attach(self, recorded: Recorded, folder: Path) -> None:
        """Keep the files in `folder` with a run: not here."""

    def finish(self, recorded: Recorded, status: str, ended: float) -> None:
        self._change(recorded, lambda run: run.update(status=status))

    def _change(self, recorded: Recorded, change: Callable[[dict[str, Any]], Any]) -> None:
        path = self.folder / recorded.id
        run = json.loads(path.read_text())
        change(run)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(run, indent=1))
        part.replace(path)
