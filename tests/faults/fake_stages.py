"""Stages that do no work: what they would compute is a hash chain, so equal inputs give equal bits however it was cut.

Everything around them is the real node program: gate, leases, heartbeats, commits, signals, exit codes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

from jobs.node.context import StageContext
from jobs.node.preemption import Preempted
from orchestrator.errors import TrainingDiverged
from orchestrator.spec.work import EvaluateWork, TrainWork, Work
from orchestrator.store import Blob
from orchestrator.store.repairs import owner_of
from tests.faults.troubles import happen, reached

CHECKPOINT_STEPS = 10


def run(context: StageContext, work: Work) -> None:
    """Commit bytes that depend on the stage's payload and on every parent's bytes."""
    execution_log(context, "begin")
    misbehave(context)
    if not isinstance(work, TrainWork):
        happen(context.label, "middle")
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    if isinstance(work, TrainWork):
        train(context, work)
        return
    seen = hashlib.sha256(context.stage.encode())
    for parent in work.parents.values():
        for blob in context.manifest(parent).blobs:
            if "frozen" in blob.name:
                context.fetch(parent, blob.name)
            elif blob.name.endswith(".bin"):
                seen.update(context.fetch(parent, blob.name).read_bytes())
    body = seen.digest()
    metrics = {}
    if isinstance(work, EvaluateWork):
        effects = json.loads(os.environ.get("FAKE_EFFECTS", "{}"))  # freeze word of the state -> what is added
        added = sum(effects.get(context.manifest(parent).info.get("freeze"), 0.0) for parent in work.parents.values())
        metrics = {"val_loss" if work.suite == "lm" else work.suite: int.from_bytes(body[:4]) / 2**32 + added}
    context.commit(work, blobs={"out.bin": body * 64}, metrics=metrics)


def train(context: StageContext, work: TrainWork) -> None:
    """Walk the hash chain from the last committed state to `work.stop`."""
    step = work.start
    source = work.parent
    for candidate in range(work.stop - 1, work.start, -1):
        if context.store.artifacts.get(work.key_at(candidate)) is not None:
            step, source = candidate, work.key_at(candidate)
            break
    name = "weights.bin" if step or work.history else "out.bin"
    state = context.fetch(source, name).read_bytes()[:32]
    tokens = context.fetch(work.conditions.tokens, "out.bin").read_bytes()
    link = hashlib.sha256(tokens + work.conditions.digest().encode()).digest()
    pause = float(os.environ.get("FAKE_STEP_SECONDS", "0"))
    with context.job.signals.deferred():
        while step < work.stop:
            step += 1
            state = hashlib.sha256(state + link + step.to_bytes(4)).digest()
            context.progress(step, work.stop, loss=1.0, tokens_per_second=1000.0)
            if moment := reached(work, step):
                happen(context.label, moment)
            time.sleep(pause)
            if step == work.stop or step % CHECKPOINT_STEPS == 0 or context.stopping:
                commit_state(context, work, step, state)
            if context.stopping and step < work.stop:
                raise Preempted(context.job.signals.requested)


def commit_state(context: StageContext, work: TrainWork, step: int, state: bytes) -> None:
    """Commit the state at `step` under its own key."""
    reached = dataclasses.replace(work, stop=step)
    digest = hashlib.sha256(state).hexdigest()
    info = {"step": step, "weights_sha256": digest, "seconds": 0.1, "freeze": work.conditions.train.freeze}
    blobs = [context.write_blob("weights.bin", state * 64)]
    if os.environ.get("FAKE_SHARED"):
        blobs.append(shared(context, work))
    parents = {key: context.manifest(key).digest for key in work.parents.values()}
    context.commit_written(reached, work.key_at(step), tuple(blobs), {}, info, parents)


def shared(context: StageContext, work: TrainWork) -> Blob:
    """Return a file that the first state of a chain writes and every later one names.

    Its bytes are FAKE_SHARED's, which another process may have otherwise.
    """
    found = [blob for blob in context.manifest(work.parent).blobs if "frozen" in blob.name]
    if not found:
        return context.write_blob("weights-frozen.bin", os.environ["FAKE_SHARED"].encode() * 512)
    return dataclasses.replace(found[0], name=f"kept-{owner_of(found[0])}/weights-frozen.bin")


def execution_log(context: StageContext, event: str) -> None:
    """Append to the list of executions that the harness compares: past the gate, so every line is real work."""
    path = os.environ.get("FAKE_LOG")
    if path:
        token = context.job.reporter.lease(context.stage).token
        line = {"event": event, "stage": context.stage, "attempt": context.attempt, "token": token, "pid": os.getpid()}
        with open(path, "a") as file:
            file.write(json.dumps({**line, "time": time.time()}) + "\n")


def misbehave(context: StageContext) -> None:
    """Do what the file FAKE_ORDERS asks of stages whose label contains a text; an order with `times` wears out."""
    path = os.environ.get("FAKE_ORDERS")
    if not path or not Path(path).exists():
        return
    for index, order in enumerate(json.loads(Path(path).read_text())):
        if order["label"] not in context.label:
            continue
        used = Path(f"{path}.{index}")
        count = len(used.read_text()) if used.exists() else 0
        if count >= order.get("times", 10**9):
            continue
        with used.open("a") as file:
            file.write("x")
        what = order["do"]
        if what == "nan":
            raise TrainingDiverged("the loss is not finite at step 7", hint="lower the learning rate")
        if what == "error":
            raise RuntimeError(order.get("message", "a deliberate failure"))
        if what == "import":
            import a_package_that_does_not_exist  # type: ignore[import-not-found]  # noqa: F401
        if what == "kill":
            os.kill(os.getpid(), 9)
        if what == "exit":
            os._exit(int(order["code"]))
        if what == "hoard":
            hoard = b"x" * int(context.resources.memory_gb * 1.25 * 2**30)
            time.sleep(30)
            del hoard
        if what == "sleep":
            time.sleep(float(order["seconds"]))
