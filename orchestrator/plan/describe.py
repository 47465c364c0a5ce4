"""What a batch says of its jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from orchestrator.plan.graph import StageGraph
from orchestrator.plan.moments import keeps_moments
from orchestrator.plugins import LOADED
from orchestrator.spec.cell import Resources
from orchestrator.spec.identity import plain
from orchestrator.spec.providers import of_all, uses_of
from orchestrator.spec.work import work_to_json
from orchestrator.store.attempts import Fields, PlannedJob, PlannedStage


def describe_job(
    graph: StageGraph, attempt: str, keys: Sequence[str], resources: Resources, overrides: Mapping[str, object]
) -> PlannedJob:
    """Return the job of a submission: everything a node needs to run these stages.

    `overrides` replace fields of the grid's execution.
    """
    execution = {name: value for name, value in plain(graph.execution(keys[0])).items() if name != "resources"}
    execution |= overrides
    stages = [graph.stages[key] for key in keys]
    uses = of_all(use for stage in stages for use in uses_of(stage.work, execution["engine"]))
    label = stages[0].label if len(stages) == 1 else f"{stages[0].label} (+{len(stages) - 1})"
    planned = (
        PlannedStage(
            stage.key,
            stage.label,
            stage.phase,
            tuple(graph.users[stage.key]),
            work_to_json(stage.work),
            stage.kind != "train" or keeps_moments(graph, stage.key, keys),
            stage.parents,
        )
        for stage in stages
    )
    carried = tuple(use.to_json() for use in uses)
    return PlannedJob(attempt, label, asdict(resources), execution, tuple(planned), carried)


def plugin_files(jobs: Sequence[PlannedJob]) -> Fields:
    """Return the content of the plugin files that jobs use, by digest: they travel with their submission."""
    digests = {digest for job in jobs for digest in job.files}
    return {digest: LOADED[digest].to_json() for digest in sorted(digests)}
