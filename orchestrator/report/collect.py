"""The results of a grid, from the store alone: no tracker, no checkpoint, no YAML."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from orchestrator.errors import CorruptBlob
from orchestrator.report.baseline import comparable
from orchestrator.spec.resolve import is_causal
from orchestrator.spec.suites import item_scores
from orchestrator.store import Manifest, Store, records
from orchestrator.store.attempts import Failure

DONE, FAILED, BLOCKED, RUNNING, PENDING = "done", "failed", "blocked", "running", "pending"
ITEMS_BLOB = "items.parquet"
BASE = "base"  # the intervention column of items scored without one
NO_SCORES = ("task", "item", "intervention", "target")  # columns of items that are no scores


@dataclass(frozen=True, slots=True)
class CellResult:
    """What is known of one cell. `metrics` are those of the last fraction, `by_at` those of every fraction."""

    id: str
    name: str
    setting: str
    factors: Mapping[str, Any]
    seed: Any
    state: str
    reason: str
    metrics: Mapping[str, float]
    stderr: Mapping[str, float]
    number: Mapping[str, int]
    chance: Mapping[str, float]
    by_at: Mapping[float, Mapping[str, float]]
    weights_sha256: str
    causal: bool
    document: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """The cells that differ in their seed alone."""

    name: str
    factors: Mapping[str, Any]
    cells: tuple[CellResult, ...]

    @property
    def causal(self) -> bool:
        """Whether no later token can change an earlier one's output."""
        return all(cell.causal for cell in self.cells)

    def values(self, metric: str, at: float | None = None) -> dict[Any, float]:
        """Return seed -> value of the cells that have the metric (at the last fraction unless `at` is given)."""
        found = {}
        for cell in self.cells:
            metrics = cell.metrics if at is None else cell.by_at.get(at, {})
            if metric in metrics:
                found[cell.seed] = metrics[metric]
        return found

    def reason(self) -> str:
        """Return why values are missing, "" when none is."""
        reasons = dict.fromkeys(cell.reason for cell in self.cells if cell.state != DONE)
        return "; ".join(reasons)


@dataclass(frozen=True)
class Results:
    """Everything a table, a figure or a comparison needs."""

    store: Store
    document: Mapping[str, Any]
    cells: tuple[CellResult, ...]
    manifests: Mapping[str, Manifest]
    failures: Mapping[str, Failure]
    memory: dict[Any, Any] = field(default_factory=dict)  # what tables and figures compute more than once
    damaged: dict[str, str] = field(default_factory=dict)  # artifacts that could not be read, with the cause

    @property
    def name(self) -> str:
        """The grid's name."""
        return str(self.document["name"])

    @cached_property
    def settings(self) -> tuple[Setting, ...]:
        """The settings in the grid's order."""
        grouped: dict[str, list[CellResult]] = {}
        for cell in self.cells:
            grouped.setdefault(cell.setting, []).append(cell)
        return tuple(
            Setting(name, {k: v for k, v in cells[0].factors.items() if k != "seed"}, tuple(cells))
            for name, cells in grouped.items()
        )

    @cached_property
    def factors(self) -> tuple[str, ...]:
        """The factors, without the seed, that take more than one value in this grid."""
        names = [name for name in self.document["factors"] if name != "seed"]
        varying = [n for n in names if len({str(setting.factors.get(n, "")) for setting in self.settings}) > 1]
        return tuple(varying or names[:1])

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """All metrics of the last fraction, the primary ones first, then in the order of the suites."""
        seen = dict.fromkeys(metric for cell in self.cells for metric in cell.metrics)
        primary = [metric for metric in self.primary if metric in seen]
        return (*primary, *(metric for metric in seen if metric not in primary))

    @property
    def primary(self) -> tuple[str, ...]:
        """The metrics that decide at this scale."""
        return tuple(self.document.get("primary", ()))

    @property
    def most_seeds(self) -> int:
        """How many seeds a setting may have where the results choose their number, 0 where it is fixed."""
        return int((self.document.get("adaptive") or {}).get("max_seeds", 0))

    @cached_property
    def task_metrics(self) -> dict[str, str]:
        """Task -> the accuracy its paper reports (`acc` or `acc_norm`)."""
        found: dict[str, str] = {}
        for cell in self.document["cells"]:
            for task in (cell.get("resolved", {}).get("evaluate") or {}).get("tasks", ()):
                found[task["name"]] = task.get("metric", "acc")
        return found

    def comparable(self, setting: Setting) -> tuple[Setting | None, str]:
        """Return the baseline that `setting` differs from in one declared factor, or None and the reason."""
        return comparable(setting, self.settings, self.document.get("baseline") or {})

    def items(self, cell: CellResult) -> dict[str, dict[str, dict[str, float]]]:
        """Return column -> task -> item -> score at the last fraction, of the columns whose mean is a metric."""
        if cell.id not in self.memory:
            self.memory[cell.id] = self._read_items(cell)
        found: dict[str, dict[str, dict[str, float]]] = self.memory[cell.id]
        return found

    def series(self, cells: Sequence[CellResult]) -> dict[str, list[records.Row]]:
        """Return cell id -> the stitched rows of its last phase, as far as they are committed."""
        stages = self.document["stages"]
        wanted: dict[str, list[str]] = {}
        for cell in cells:
            phase = stages[cell.document["final"]]["phase"]
            keys = [k for k in cell.document["stages"] if stages[k]["kind"] == "train" and stages[k]["phase"] == phase]
            wanted[cell.id] = [key for key in keys if key in self.manifests]
        unique = sorted({key for keys in wanted.values() for key in keys})
        rows = records.committed_rows(self.store, [self.manifests[key] for key in unique], self.damaged)
        return {
            cell: records.ordered(row for key in keys for row in rows.get(key, ())) for cell, keys in wanted.items()
        }

    def _read_items(self, cell: CellResult) -> dict[str, dict[str, dict[str, float]]]:
        import pyarrow.parquet as pq

        last = max((r["at"] for r in cell.document["results"]), default=0)
        found: dict[str, dict[str, dict[str, float]]] = {}
        for result in cell.document["results"]:
            manifest = self.manifests.get(result["key"])
            if manifest is None or result["at"] != last:
                continue
            measured = {pair for name in manifest.metrics for pair in item_scores(name).items()}
            if not measured or not any(blob.name == ITEMS_BLOB for blob in manifest.blobs):
                continue
            try:
                file = pq.ParquetFile(io.BytesIO(self.store.artifacts.read(manifest.blob(ITEMS_BLOB))))
            except CorruptBlob as error:
                self.damaged[manifest.key] = error.cause
                continue
            columns = {column for _, column in measured} - set(NO_SCORES)
            scores = [name for name in file.schema_arrow.names if name in columns]
            keys = [name for name in NO_SCORES if name in file.schema_arrow.names]
            for column, by_task in _by_item(file.read(columns=[*keys, *scores]).to_pydict()).items():
                kept = {task: items for task, items in by_task.items() if (task, column) in measured}
                found.setdefault(column, {}).update(kept)
        return found


def collect(grid: str | Mapping[str, object], store: Store) -> Results:
    """Return the results of a grid by its name (its newest version) or its root document.

    Raises MoegridError when the store does not know the grid.
    """
    document = records.document(store, grid) if isinstance(grid, str) else records.with_sections(grid)
    stages = document["stages"]
    users = Counter(key for cell in document["cells"] for key in cell["stages"])
    view = look(set(document["keys"]), store)
    naming = Naming(lambda key: str(stages[key]["label"]), lambda key: users[key] > 1, str(document.get("seed", "")))
    cells = tuple(cell_result(cell, view, naming) for cell in document["cells"])
    return Results(store, document, cells, view.manifests, view.failures)


@dataclass(frozen=True, slots=True)
class View:
    """What a store holds of a grid's stages: what is done, what failed, what is at work."""

    manifests: Mapping[str, Manifest]
    failures: Mapping[str, Failure]
    live: frozenset[str]


@dataclass(frozen=True, slots=True)
class Naming:
    """How a grid calls a stage, whether several cells use it, and which of its seeds is plain."""

    label: Callable[[str], str]
    is_shared: Callable[[str], bool]
    seed: str


def look(keys: set[str], store: Store) -> View:
    """Return what the store holds of these stages."""
    manifests = store.index.many(keys)
    missing = keys - manifests.keys()
    failures = records.failures(store, missing) if missing else {}
    live = {stage for stage, state in store.claims.of(missing).items() if state.live} if missing else set()
    return View(manifests, failures, frozenset(live))


def cell_result(cell: Mapping[str, Any], view: View, naming: Naming) -> CellResult:
    """Return what is known of the cell of such an entry of a root document."""
    by_at: dict[float, dict[str, float]] = {}
    stderr: dict[str, float] = {}
    number: dict[str, int] = {}
    chance: dict[str, float] = {}
    for result in sorted(cell["results"], key=lambda r: r["at"]):
        manifest = view.manifests.get(result["key"])
        if manifest is not None:
            by_at.setdefault(float(result["at"]), {}).update(manifest.metrics)
            stderr |= manifest.info.get("stderr", {})
            number |= manifest.info.get("n", {})
            chance |= manifest.info.get("chance", {})
    last = max((float(result["at"]) for result in cell["results"]), default=1.0)
    final = view.manifests.get(cell["final"])
    state, reason = _state(cell, view, naming)
    seeds = cell.get("resolved", {}).get("seed", {})
    return CellResult(
        id=cell["id"],
        name=cell["name"],
        setting=cell["setting"],
        factors=cell["factors"],
        seed=cell["factors"].get("seed", seeds.get(naming.seed, 0)),
        state=state,
        reason=reason,
        metrics=by_at.get(last, {}),
        stderr=stderr,
        number=number,
        chance=chance,
        by_at=by_at,
        weights_sha256=str(final.info.get("weights_sha256", "")) if final else "",
        causal=is_causal(cell.get("resolved", {}).get("model", {}).get("moe", {})),
        document=cell,
    )


def _state(cell: Mapping[str, Any], view: View, naming: Naming) -> tuple[str, str]:
    """Return the cell's state and, unless it is done, the reason."""
    wanted = [cell["final"], *(result["key"] for result in cell["results"])]
    if all(key in view.manifests for key in wanted):
        return DONE, ""
    missing = [key for key in cell["stages"] if key not in view.manifests]
    for key in missing:
        failure = view.failures.get(key)
        if failure and key not in view.live:
            text = f"{naming.label(key)}: {failure.kind}: {failure.message}"
            return (BLOCKED, f"blocked by {text}") if naming.is_shared(key) else (FAILED, text)
    running = next((key for key in missing if key in view.live), "")
    return (RUNNING, f"running: {naming.label(running)}") if running else (PENDING, "not run yet")


def _by_item(columns: Mapping[str, Sequence[object]]) -> dict[str, dict[str, dict[str, float]]]:
    tasks, items = columns["task"], columns["item"]
    plain = [intervention in ("", BASE) for intervention in columns.get("intervention", [""] * len(tasks))]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, values in columns.items():
        if name in NO_SCORES:
            continue
        for task, item, value, keep in zip(tasks, items, values, plain, strict=True):
            if keep and isinstance(value, (int, float)):
                found.setdefault(name, {}).setdefault(str(task), {})[str(item)] = float(value)
    return found
