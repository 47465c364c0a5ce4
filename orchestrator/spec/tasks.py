"""A task as a grid names it, with what its declaration says where the grid says nothing."""

from __future__ import annotations

from orchestrator.catalog.tasks import TASKS, TaskKind
from orchestrator.registry import file_of
from orchestrator.spec.cell import TaskSpec


def published(kind: TaskKind) -> TaskSpec:
    """Return a task with its own shots, metric and source of items."""
    source = kind.source
    if source and "://" not in source:
        source = f"file://{file_of(source, f'task {kind.name!r}')}"
    return TaskSpec(kind.name, kind.shots, metric=kind.metric, source=source, revision=kind.revision)


# Ours, which have no source of their own.
PUBLISHED = {name: published(kind) for name, kind in TASKS.builtins.items()}
