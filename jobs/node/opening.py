"""How a node gets at its work: the store, which may be away for a while, and the job that a submission describes."""

from __future__ import annotations

from dataclasses import dataclass

from jobs.node.patience import patiently
from orchestrator.errors import MoegridError, StoreError
from orchestrator.spec.cell import Execution, Resources
from orchestrator.spec.rebuilding import build
from orchestrator.spec.work import Work, work_from_json
from orchestrator.store import Store
from orchestrator.store.attempts import Fields, PlannedJob, submission_path

# How long a node that has not begun waits for its store; after that the driver starts it again, with growing pauses.
START_PATIENCE_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class StageRequest:
    """One stage of the submission: its key, its label for people, its payload; do others go on from its state?"""

    key: str
    label: str
    work: Work
    moments: bool = True


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One job of the submission."""

    attempt: str
    resources: Resources
    execution: Execution
    stages: tuple[StageRequest, ...]


def open_store(url: str) -> Store:
    """Open the store that the driver has made; StoreError if it is not there or away for START_PATIENCE_SECONDS."""
    return patiently(lambda: _open_store(url), f"store {url}", START_PATIENCE_SECONDS)


def _open_store(url: str) -> Store:
    if not Store.peek(url).exists:
        # A folder that is not mounted looks like one: a store made there would hide behind the mount.
        raise StoreError(
            f"there is no store in {url}",
            cause="it has no store.json",
            hint="check that its file system is mounted on this machine, or that the bucket was not made anew",
        )
    return Store.open(url)


def planned_job(store: Store, batch: str, index: int) -> tuple[PlannedJob, list[Fields]]:
    """Return the job `index` of a batch as its driver wrote it down, and the plugin files that it brings along.

    Raises StoreError if that is absent or damaged.
    """
    return patiently(lambda: _planned_job(store, batch, index), f"submission {batch}", START_PATIENCE_SECONDS)


def _planned_job(store: Store, batch: str, index: int) -> tuple[PlannedJob, list[Fields]]:
    path = submission_path(batch)
    submission = store.get_json(path)
    if submission is None:
        raise StoreError(
            f"there is no submission {path} in {store.url}",
            cause="it is empty, or it was deleted after its driver wrote it",
            hint="moegrid resume submits the work again",
        )
    try:
        # Of a large batch the others' jobs are none of this one's business.
        job = PlannedJob.parse(submission["jobs"][index])
        files = [submission["plugin_files"][digest] for digest in job.files]
        if not job.stages:
            raise ValueError("it names no stage")
    except (LookupError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} in {store.url} is damaged",
            cause=f"{type(error).__name__}: {error}",
            hint="moegrid resume submits the work again",
        ) from error
    return job, files


def read_job(job: PlannedJob) -> JobRequest:
    """Return a planned job; raises MoegridError when a payload does not make its planned key."""
    stages = []
    for stage in job.stages:
        work = work_from_json(stage.work)
        if work.key() != stage.key:
            raise MoegridError(
                f"stage {stage.label} does not produce the artifact it was planned for",
                cause="the node runs another version of the project than the one that planned",
                hint="deploy one version on the driver and on the nodes, then plan again",
            )
        stages.append(StageRequest(stage.key, stage.label, work, stage.moments))
    resources = build(Resources, job.resources)
    execution = build(Execution, {"resources": {}, **job.execution})
    return JobRequest(job.attempt, resources, execution, tuple(stages))
