"""Run one job of a batch on a node: `python -m jobs.run --store URL --batch BATCH --job INDEX`.

A job is a chain of stages, run in order in one process (or one per rank). Exit codes: 0 done, 75 checkpointed on a
signal, 76 not this process's work any more, 1 failed as `attempts/<attempt>/failure.json` says.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import failures, numerics
from jobs.preemption import Preempted, Signals
from jobs.watchdog import Hung, Watchdog
from jobs.world import World, launch, world_from
from orchestrator.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, MoegridError, StoreError
from orchestrator.spec.cell import Execution, Resources
from orchestrator.spec.work import EvaluateWork, Work, build, work_from_json

log = logging.getLogger("jobs.run")

# Where each kind of stage is implemented; evaluations by suite. Imported when run: a data stage never loads torch.
STAGES: dict[str, str] = {
    "data": "jobs.data.sources",
    "tokenizer": "jobs.data.tokenizer",
    "tokens": "jobs.data.tokens",
    "init": "jobs.train.init",
    "train": "jobs.train.stage",
    "evaluate/lm": "jobs.evaluate.lm",
    "evaluate/reasoning": "jobs.evaluate.reasoning",
    "evaluate/efficiency": "jobs.evaluate.efficiency",
    "evaluate/probe": "jobs.probe.collect",
    "evaluate/hallucination": "jobs.evaluate.benchmarks",
    "evaluate/adversarial": "jobs.evaluate.benchmarks",
    "evaluate/ood": "jobs.evaluate.benchmarks",
    "generate": "jobs.evaluate.responses",
    "judge": "jobs.evaluate.judges",
}
# Stages on which every rank works; of a job with ranks the others are rank 0's alone.
RANKED = frozenset(
    {
        "train",
        "generate",
        "judge",
        *(f"evaluate/{suite}" for suite in ("lm", "reasoning", "efficiency", "hallucination", "adversarial", "ood")),
    }
)
TORCH_KINDS = ("init", "train", "evaluate", "generate", "judge")
SCRATCH = "moegrid-job-"
# Containers may share a folder and not see each other's processes: only what is old goes.
SCRATCH_SECONDS = 86_400.0


@dataclass(frozen=True, slots=True)
class StageRequest:
    """One stage of the submission: its key, its label for people, and its payload."""

    key: str
    label: str
    work: Work


@dataclass(frozen=True, slots=True)
class JobRequest:
    """One job of the submission."""

    attempt: str
    resources: Resources
    execution: Execution
    stages: tuple[StageRequest, ...]


def read_job(submission: dict[str, Any], index: int) -> JobRequest:
    """Return job `index` of a submission; raises MoegridError when a payload does not make its planned key."""
    job = submission["jobs"][index]
    stages = []
    for stage in job["stages"]:
        work = work_from_json(stage["work"])
        if work.key() != stage["key"]:
            raise MoegridError(
                f"stage {stage['label']} does not produce the artifact it was planned for",
                cause="the node runs another version of the project than the one that planned",
                hint="deploy one version on the driver and on the nodes, then plan again",
            )
        stages.append(StageRequest(stage["key"], stage["label"], work))
    resources = build(Resources, job["resources"])
    execution = build(Execution, {"resources": {}, **job["execution"]})
    return JobRequest(job["attempt"], resources, execution, tuple(stages))


def stage_name(work: Work) -> str:
    """Return the name under which `STAGES` has the work's implementation."""
    return f"evaluate/{work.suite}" if isinstance(work, EvaluateWork) else work.kind


def stage_function(work: Work) -> Callable[[Any, Any], None]:
    """Return the function that runs `work`, importing its module."""
    function: Callable[[Any, Any], None] = importlib.import_module(STAGES[stage_name(work)]).run
    return function


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job that the command line names and return the process's exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m jobs.run", description=__doc__)
    parser.add_argument("--store", required=True, help="URL of the object store")
    parser.add_argument("--batch", required=True, help="name of the submission")
    parser.add_argument("--job", required=True, type=int, help="index of the job in the submission")
    options = parser.parse_args(arguments)
    signals = Signals()
    signals.install()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        return run_job(options.store, options.batch, options.job, signals, arguments)
    except Preempted:
        return EXIT_PREEMPTED
    except MoegridError as error:
        print(error, file=sys.stderr)
        return EXIT_FAILED


def run_job(url: str, batch: str, index: int, signals: Signals, arguments: Sequence[str] = ()) -> int:
    """Run one job and return its exit code; failures are recorded in the store."""
    from orchestrator.store import Store

    store = Store.open(url)
    path = f"submissions/{batch}.json"
    submission = store.get_json(path)
    if submission is None:
        raise MoegridError(f"there is no submission {path}", hint="was the store changed or cleaned after planning?")
    attempt = submission["jobs"][index]["attempt"]
    try:
        request = read_job(submission, index)
    except (MoegridError, KeyError, TypeError) as error:
        record = {**failures.describe(submission["jobs"][index]["stages"][0]["key"], error), "kind": "bad_spec"}
        store.objects.put(f"attempts/{attempt}/failure.json", json.dumps(record).encode())
        log.error("%s", error)
        return EXIT_FAILED
    world = world_from(os.environ)
    ranks = request.resources.nodes * request.resources.processes
    if world is None and ranks > 1:
        return launch(arguments, ranks)
    with contextlib.ExitStack() as stack:
        sweep_scratch(Path(tempfile.gettempdir()))
        scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-"))
        stack.callback(shutil.rmtree, scratch, ignore_errors=True)
        return _run_stages(store, request, signals, world or World(), scratch)


def sweep_scratch(folder: Path, older_than: float = SCRATCH_SECONDS) -> None:
    """Delete scratch directories that killed jobs of this user left behind."""
    for path in folder.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError, ValueError):
            status, pid = path.stat(), int(path.name.removeprefix(SCRATCH).split("-")[0])
            old = time.time() - status.st_mtime > older_than
            if old and status.st_uid == os.getuid() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(path, ignore_errors=True)


def _run_stages(store: Any, request: JobRequest, signals: Signals, world: World, scratch: Path) -> int:
    from jobs.context import Job, release
    from jobs.logs import LogFile
    from jobs.reporter import Reporter

    numerics.set_threads(request.resources)
    reporter = Reporter(store, request.attempt, world.rank, LogFile(scratch, alone=world.size == 1))
    reporter.beat(world_size=world.size)
    job = Job(
        store=store,
        attempt=request.attempt,
        execution=request.execution,
        resources=request.resources,
        scratch=scratch,
        signals=signals,
        reporter=reporter,
        rank=world.rank,
        local_rank=world.local_rank,
        world_size=world.size,
    )
    job.watchdog = Watchdog(request.execution.hang_seconds, lambda hung: _end_hung(job, request.stages[0].key, hung))
    code = _guarded(job, request.stages[0].key, lambda: _work_through(job, request, world))
    # What still goes on in the background is committed also when the process was stopped or a later stage failed.
    with signals.deferred():
        for finish in job.finishers:
            code = _guarded(job, request.stages[0].key, finish) or code
        if world.size > 1 and code == EXIT_DONE:
            from jobs.train.distributed import leave

            leave(world.rank, world.size)
        for key in reporter.held():
            release(job, key, reopen=code == EXIT_PREEMPTED)
        reporter.beat(exit_code=code)
        with contextlib.suppress(StoreError):
            reporter.close()
    return code


def _guarded(job: Any, stage: str, action: Callable[[], None]) -> int:
    """Run `action` and return the exit code; a failure is recorded with the stage that was running."""
    try:
        action()
    except Preempted as stopped:
        log.info("stopped by %s, state saved", stopped)
        return EXIT_PREEMPTED
    except Exception as error:
        code = failures.exit_code_of(error)
        failed = job.live.get("stage", stage)
        log.error("stage %s failed", failed[:12], exc_info=error)
        if code != failures.EXIT_NOT_MINE:
            _record_failure(job, failed, error)
        return code
    return EXIT_DONE


def _end_hung(job: Any, stage: str, hung: Hung) -> None:
    """Say where the process hangs, then end it: nothing that waits for it will ever return."""
    _record_failure(job, job.live.get("stage", stage), hung)
    log.error("rank %d: %s", job.rank, hung)
    faulthandler.dump_traceback(sys.stderr)
    job.reporter.beat(exit_code=EXIT_FAILED)
    with contextlib.suppress(StoreError):
        job.reporter.close()
    os._exit(EXIT_FAILED)


def _work_through(job: Any, request: JobRequest, world: World) -> None:
    from jobs.context import release

    todo: list[str] = []
    if world.rank == 0:
        _enter(job, request)
    job.reporter.start()
    if world.rank == 0:
        todo = _todo(job, request)
    if any(stage.work.kind in TORCH_KINDS for stage in request.stages):
        numerics.prepare_torch(request.execution, request.resources)
    if world.size > 1:
        from jobs.train.distributed import join

        todo = join(world, request.execution, todo)
    for stage in request.stages:
        if stage.key not in todo:
            log.info("%s: exists already", stage.label)
            release(job, stage.key)
            continue
        if world.size == 1:  # ranks agree on a stop inside the training loop, or they would part here
            job.signals.check()
        if job.rank and stage_name(stage.work) not in RANKED:
            continue
        _run_stage(job, stage)


def _enter(job: Any, request: JobRequest) -> None:
    """Take a new fencing token for every stage of the chain; raises LeaseLost before any work when one is not ours."""
    for stage in request.stages:
        job.reporter.hold(job.store.claims.enter(stage.key, job.attempt))


def _todo(job: Any, request: JobRequest) -> list[str]:
    """Return the keys of the stages to run: those without a sound artifact made from the present parents."""
    todo = []
    artifacts = job.store.artifacts
    for stage in request.stages:
        if artifacts.heal(stage.key):
            log.warning("%s: its artifact is damaged; making it again", stage.label)
        existing = artifacts.get(stage.key)
        if existing is not None and artifacts.stale([existing]):
            log.warning("%s: its artifact was made from other parents; making it again", stage.label)
            artifacts.discard(stage.key, attempt=existing.attempt)
            existing = None
        if existing is None:
            todo.append(stage.key)
    return todo


def _run_stage(job: Any, stage: StageRequest) -> None:
    from jobs.context import StageContext

    log.info("%s: starting", stage.label)
    job.live["stage"] = stage.key
    job.reporter.beat(stage=stage.key, label=stage.label, step=0, total=0)
    context = StageContext(job, stage.key, stage.label)
    stage_function(stage.work)(context, stage.work)
    if stage.work.kind != "train":  # a training stage's last state is committed in the background; its writer lets go
        context.release()
    log.info("%s: done", stage.label)


def _record_failure(job: Any, stage: str, error: BaseException) -> None:
    record = json.dumps(failures.describe(stage, error)).encode()
    try:
        # The first rank that fails is the cause; the others' errors follow from it.
        job.store.objects.create(f"attempts/{job.attempt}/failure.json", record)
    except StoreError as unreachable:
        log.error("failure not recorded: %s", unreachable.error)


if __name__ == "__main__":
    sys.exit(main())
