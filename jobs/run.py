"""Run one job of a batch on a node: `python -m jobs.run --store URL --batch BATCH --job INDEX`.

A job is a chain of stages, run in order in one process (or one per rank). Exit codes: 0 done, 75 checkpointed on a
signal, 76 not this process's work any more, 69 the store, a disk or a service was in the way, 1 the work itself failed.
`attempts/<attempt>/failure.json` says how, or the same record as a line of the log where the store could not take it.
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
from pathlib import Path
from typing import Any

from jobs.node import failures, numerics
from jobs.node.context import Job, StageContext, release
from jobs.node.logs import LogFile
from jobs.node.opening import START_PATIENCE_SECONDS, JobRequest, StageRequest, open_store, planned_job, read_job
from jobs.node.patience import patiently
from jobs.node.plugins import bring_plugins
from jobs.node.preemption import Preempted, Signals
from jobs.node.reporter import Reporter
from jobs.node.watchdog import Hung, Watchdog
from jobs.node.world import World, launch, own_world
from orchestrator.catalog.kinds import STAGES, computes
from orchestrator.catalog.parameters import code_of
from orchestrator.catalog.suites import SUITES
from orchestrator.ending import ends_at_once, with_code
from orchestrator.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_NOT_MINE,
    EXIT_PREEMPTED,
    SPOKEN_END,
    MoegridError,
    PluginError,
    StoreError,
)
from orchestrator.spec.work import EvaluateWork, Work
from orchestrator.store import Lease, Store
from orchestrator.store.attempts import report_path

log = logging.getLogger("jobs.run")


SCRATCH = "moegrid-job-"
# Containers may share a folder and not see each other's processes: only what is old goes.
SCRATCH_SECONDS = 86_400.0
# How long the record of the work's own failure waits for a store that is away.
RECORD_PATIENCE_SECONDS = 60.0


def ranked(work: Work) -> bool:
    """Return whether every rank works on a stage."""
    kind = STAGES.get(_name_of(work))
    if kind is None and isinstance(work, EvaluateWork):
        return SUITES.get(work.suite).ranked
    return kind is not None and kind.ranked


def stage_function(work: Work) -> Callable[[Any, Any], None]:
    """Return the function that runs `work`, importing its module; that of a package's suite is its own."""
    name = _name_of(work)
    if isinstance(work, EvaluateWork) and name not in STAGES:
        return code_of(SUITES, work.suite, work.parameters)
    function: Callable[[Any, Any], None] = importlib.import_module(STAGES[name].module).run
    return function


def _name_of(work: Work) -> str:
    return f"evaluate/{work.suite}" if isinstance(work, EvaluateWork) else work.kind


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


def run_job(url: str, batch: str, index: int, signals: Signals, arguments: Sequence[str] = ()) -> int:
    """Run one job and return its exit code; failures are recorded in the store, or in the log while it is away."""
    store, attempt, stage = None, f"{batch}-{index}", ""
    try:
        store = open_store(url)
        planned, files = planned_job(store, batch, index)
        attempt, stage = planned.attempt, planned.stages[0].key
        with contextlib.ExitStack() as stack:
            sweep_scratch(Path(tempfile.gettempdir()))
            scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-"))
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            try:
                bring_plugins(planned, files, scratch / "plugins")
                request = read_job(planned)
            except PluginError:
                raise
            except (MoegridError, KeyError, TypeError) as error:
                return _give_up(store, attempt, {**failures.describe(stage, error), "kind": "bad_spec"}, error)
            ranks = request.resources.nodes * request.resources.processes
            world = own_world(os.environ, ranks)
            if world is None:
                # What a plugin brings is loaded here, and would be twice in a fork.
                if numerics.may_fork() and not planned.plugins:
                    return launch(arguments, ranks, lambda: main(arguments))
                numerics.leave_fork()
                return launch(arguments, ranks)
            if not numerics.fits_fork(request.resources, [stage.work.kind for stage in request.stages]):
                stack.close()
                numerics.leave_fork()
                os.execv(sys.executable, [sys.executable, "-m", "jobs.run", *arguments])
            return _run_stages(store, request, signals, world, scratch)
    except Exception as error:
        return _give_up(store, attempt, failures.describe(stage, error), error)


def _give_up(store: Store | None, attempt: str, record: dict[str, Any], error: BaseException) -> int:
    """Record what went wrong around the stages and return the exit code."""
    log.error("attempt %s failed", attempt, exc_info=error)
    _tell(store, attempt, record)
    return int(record["exit_code"])


def _tell(store: Store | None, attempt: str, record: dict[str, Any], patience: float = 0.0) -> None:
    """Write `failure.json`, or say it in the log when the store cannot take it for `patience` seconds."""
    path = report_path(attempt)
    try:
        if store is not None:
            # The first rank that fails is the cause; the others' errors follow from it.
            patiently(lambda: store.objects.create(path, json.dumps(record).encode()), "failure record", patience)
            return
    except StoreError as unreachable:
        log.error("failure not recorded: %s", unreachable.error)
    print(failures.spoken(attempt, record), file=sys.stderr, flush=True)


def sweep_scratch(folder: Path, older_than: float = SCRATCH_SECONDS) -> None:
    """Delete scratch directories that killed jobs of this user left behind."""
    for path in folder.glob(f"{SCRATCH}*"):
        with contextlib.suppress(OSError, ValueError):
            status, pid = path.stat(), int(path.name.removeprefix(SCRATCH).split("-")[0])
            old = time.time() - status.st_mtime > older_than
            if old and status.st_uid == os.getuid() and not Path(f"/proc/{pid}").exists():
                shutil.rmtree(path, ignore_errors=True)


def _run_stages(store: Store, request: JobRequest, signals: Signals, world: World, scratch: Path) -> int:
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
        if code == EXIT_DONE and not world.rank:
            code = _guarded(job, request.stages[0].key, lambda: _check_committed(job, request))
        if world.size > 1 and code == EXIT_DONE:
            from jobs.node.ranks import leave

            leave(world.rank, world.size)
        for key in reporter.held():
            release(job, key, reopen=code == EXIT_PREEMPTED)
        reporter.beat(exit_code=code)
        with contextlib.suppress(StoreError):
            reporter.close()
    return code


def _guarded(job: Job, stage: str, action: Callable[[], None]) -> int:
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
        if code != EXIT_NOT_MINE:
            _record_failure(job, failed, error)
        return code
    return EXIT_DONE


def _end_hung(job: Job, stage: str, hung: Hung) -> None:
    """Say where the process hangs, then end it: nothing that waits for it will ever return."""
    _record_failure(job, job.live.get("stage", stage), hung)
    log.error("rank %d: %s", job.rank, hung)
    faulthandler.dump_traceback(sys.stderr)
    job.reporter.beat(exit_code=EXIT_FAILED)
    with contextlib.suppress(StoreError):
        job.reporter.close()
    os._exit(EXIT_FAILED)


def _work_through(job: Job, request: JobRequest, world: World) -> None:
    todo: list[str] = []
    if world.rank == 0:
        _enter(job, request)
    job.reporter.start()
    if world.rank == 0:
        todo = patiently(lambda: _todo(job, request), "list of what is there", START_PATIENCE_SECONDS)
    if any(computes(stage.work.kind) for stage in request.stages):
        numerics.prepare_torch(request.execution, request.resources)
    if world.size > 1:
        from jobs.node.ranks import join

        todo = join(world, request.execution, todo, nodes=request.resources.nodes)
    job.todo = todo
    for stage in request.stages:
        if stage.key not in todo:
            log.info("%s: exists already", stage.label)
            release(job, stage.key)
            continue
        # Ranks agree on a stop inside the training loop, or they would part here.
        if world.size == 1 and not job.unsaved:
            job.signals.check()
        if job.rank and not ranked(stage.work):
            continue
        _run_stage(job, stage)


def _enter(job: Job, request: JobRequest) -> None:
    """Take a new fencing token for every stage of the chain; raises LeaseLost before any work when one is not ours."""
    for stage in request.stages:

        def enter(key: str = stage.key) -> Lease:
            return job.store.claims.enter(key, job.attempt)

        job.reporter.hold(patiently(enter, f"entering {stage.label}", START_PATIENCE_SECONDS))


def _todo(job: Job, request: JobRequest) -> list[str]:
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


def _run_stage(job: Job, stage: StageRequest) -> None:
    log.info("%s: starting", stage.label)
    job.live["stage"] = stage.key
    job.reporter.beat(stage=stage.key, label=stage.label, step=0, total=0)
    context = StageContext(job, stage.key, stage.label, moments=stage.moments)
    stage_function(stage.work)(context, stage.work)
    if stage.work.kind != "train":  # a training stage's last state is committed in the background; its writer lets go
        context.release()
    log.info("%s: done", stage.label)


def _check_committed(job: Job, request: JobRequest) -> None:
    """Raise AssertionError when a stage came back without its artifact: exit code 0 is the word that all is there."""
    for stage in request.stages:
        if stage.key in job.todo and stage.key not in job.manifests:
            raise AssertionError(f"stage {stage.label} ended without committing its artifact")
    print(f"{SPOKEN_END} {job.attempt}", file=sys.stderr, flush=True)


def _record_failure(job: Job, stage: str, error: BaseException) -> None:
    record = failures.describe(stage, error)
    # What the store did has been waited for; what the work did is worth waiting for a store that can take it.
    own = record["exit_code"] == EXIT_FAILED
    with job.signals.deferred():
        _tell(job.store, job.attempt, record, RECORD_PATIENCE_SECONDS if own else 0.0)


if __name__ == "__main__":
    ends_at_once()
    sys.exit(with_code(main()))
