"""The training stage: from the latest committed state on the way, step by step, to the wanted one."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field, replace

from jobs.moe.balance import balanced_value
from jobs.node.context import StageContext
from jobs.node.numerics import give_back_freed_memory
from jobs.node.preemption import Preempted
from jobs.train.checkpoint import CheckpointWriter
from jobs.train.collaboration import profile_collaboration, profiling_sample
from jobs.train.errors import FrozenMoved
from jobs.train.freeze import frozen_digest
from jobs.train.loop import StepResult, Trainer
from jobs.train.meter import STATE_FORMAT, Meter
from jobs.train.scale import PRECISION, LossScale
from jobs.train.schedule import balance_at, learning_rates
from jobs.train.session import (
    Session,
    engine_over,
    fixed_load,
    latest_state,
    load_session,
    mixed_in,
    training_source,
    vocabulary_size,
)
from jobs.train.stopping import Stopping
from orchestrator.catalog.engines import ENGINES
from orchestrator.catalog.freezing import freezes
from orchestrator.errors import ArtifactMissing, NumericsError
from orchestrator.spec.work import TrainWork, work_from_json
from orchestrator.store.manifest import MOMENTS

log = logging.getLogger(__name__)


# Batches of other lengths leave holes where their temporary tensors were: what has grown by half and this is trimmed.
GROWN, SLACK_GB = 1.5, 0.25


@dataclass
class Segment:
    """What one run of a stage has seen so far."""

    rows: list[str] = field(default_factory=list)  # each logged row as JSON
    began: float = field(default_factory=time.monotonic)
    marked: float = field(default_factory=time.monotonic)
    marked_tokens: int = 0
    saved: float = field(default_factory=time.monotonic)
    again: bool = False  # another stage's steps, for the optimizer's state that its artifact lacks
    resident_gb: float = 0.0  # when freed memory was last given back


def run(context: StageContext, work: TrainWork) -> None:
    """Train [start, stop); commits the state at `stop`, and periodic ones on the way."""
    with context.job.signals.deferred():
        live = context.job.live
        if "writer" not in live:
            live["writer"] = CheckpointWriter()
            context.job.finishers.append(live["writer"].wait)
        segment = Segment()
        session = _enter(context, work, segment)
        if session.saved is not None:
            segment.saved = session.saved
        live["training"] = None  # a failure leaves nothing that could be taken over
        train_segment(context, work, session, segment, live["writer"])
        live["training"] = session
        context.job.unsaved = session.saved is not None


def train_segment(
    context: StageContext, work: TrainWork, session: Session, segment: Segment, writer: CheckpointWriter
) -> None:
    """Take the steps from the session's to `work.stop` and hand the states to `writer`."""
    train = work.conditions.train
    engine = session.engine
    engine.freeze(train.freeze)
    for block in engine.model.moe_blocks:
        block.expert_dropout = train.expert_dropout
    engine.model.train()
    engine.set_lr(*learning_rates(train, session.step))
    engine.assert_lr(*learning_rates(train, session.step))
    source = training_source(context, work)
    moe = engine.model.spec.moe
    if session.step == 0 and work.conditions.collaboration_top:
        profile_collaboration(engine.model, profiling_sample(source, train.micro_batch, moe.unit))
    frozen = frozen_digest(engine, train.freeze)
    trainer = Trainer(engine, work.conditions, source, session.step, session.tokens, session.meter, session.scale)
    first = segment.marked_tokens = trainer.tokens
    begun = saved_step = trainer.step
    stopping = session.stopping
    while trainer.step < work.stop:
        writer.check()
        context.check()
        unchanged = trainer.step == saved_step and session.saved is None
        if context.world_size == 1 and context.stopping and unchanged:
            raise Preempted(context.job.signals.requested)
        if stopping.at:
            # What is left of the plan is not trained: its states have the weights that training stopped with.
            trainer.step, stop, save = work.stop, False, False
        else:
            stop, save = _step(context, work, trainer, segment, writer, stopping)
        last = trainer.step == work.stop
        if stop and not context.stopping:
            context.job.signals.requested = "another rank's signal"
        if not (last or stop or save):
            continue
        after = frozen_digest(engine, train.freeze) if last or stop else frozen
        if after != frozen:
            raise FrozenMoved(f"the frozen {train.freeze} changed between steps {work.start} and {trainer.step}")
        elapsed = time.monotonic() - segment.began
        # After a stop the next process goes on from here, if anything does.
        whole = context.moments or segment.again or not last or (stop and work.stop < train.steps)
        writer.submit(
            context,
            work,
            engine,
            trainer.step,
            _state(work, trainer, frozen, stopping),
            segment.rows,
            info={
                "phase": work.conditions.phase,
                "step": trainer.step,
                "total": train.steps,
                "tokens": trainer.tokens,
                "tokens_per_second": (trainer.tokens - first) / max(elapsed, 1e-9),
                "train_seconds": elapsed,
                "steps_run": max((stopping.at or trainer.step) - begun, 0),
                "frozen_sha256": frozen,
                "mixed_numerics": session.mixed_numerics,
                "mixed_code": session.mixed_code,
                MOMENTS: whole,
            }
            | ({"stopped_at": stopping.at} if stopping.at else {}),
            metrics={"train_loss": stopping.loss},
            last=last and not segment.again,
        )
        saved_step = trainer.step
        segment.saved = time.monotonic() if whole else segment.saved
        session.saved = None if whole else segment.saved
        if stop and not last:
            writer.wait()
            raise Preempted(context.job.signals.requested)
    session.state, session.step, session.tokens = work.key(), trainer.step, trainer.tokens


def _step(
    context: StageContext,
    work: TrainWork,
    trainer: Trainer,
    segment: Segment,
    writer: CheckpointWriter,
    stopping: Stopping,
) -> list[bool]:
    """Take one step, log it, and return whether any rank wants to stop, and to save."""
    logging_step = _logged(trainer.step + 1, work, context)
    due = _due(trainer.step + 1, context, segment, writer)
    frozen_router = freezes(work.conditions.train.freeze, "router")
    with context.job.watchdog.guard(f"step {trainer.step + 1} of {context.label}"):
        result = trainer.train_step((context.stopping, due), router_gradient=logging_step and frozen_router)
    stopping.see(work.conditions.train.stop, result.values, trainer.step)
    # After the last step of all there is no later row that could tell of the window.
    _observe(context, work, trainer, segment, result, logging_step or bool(stopping.at))
    if result.requests[0] and not context.stopping:
        context.job.signals.requested = "another rank's signal"
    return result.requests


def _enter(context: StageContext, work: TrainWork, segment: Segment) -> Session:
    """Return the session to go on from: the latest committed state, the chain's own, or the parent state."""
    writer: CheckpointWriter = context.job.live["writer"]
    live: Session | None = context.job.live.get("training")
    found = latest_state(context, work)
    if found is None and live is not None and live.state == work.parent:
        if work.start > 0 and live.phase == work.conditions.phase:
            return live
        # The other engines keep hooks in the model, and C2R's lists are part of it only from here on.
        if (
            work.start == 0
            and ENGINES.get(context.execution.engine).plain_model
            and not work.conditions.collaboration_top
            and not work.conditions.train.adapter.rank
            and live.engine.model.adapter is None
        ):
            engine = engine_over(context, work, live.engine.model)
            begun = LossScale.of(work.conditions.train.precision)
            fresh = (0, 0, Meter(), begun, Stopping())
            return Session(engine, work.conditions.phase, work.parent, *fresh, mixed_code=live.mixed_code)
    writer.wait()
    context.job.live["training"] = None
    del live
    if found is None and work.start > 0 and not context.manifest(work.parent).resumable:
        return _parent_again(context, work, writer)
    step, key = found or (work.start, work.parent)
    session = load_session(context, work, step, key)
    if step > work.start:
        segment.rows = [json.dumps(row) for row in json.loads(context.fetch(key, "series.json").read_bytes())]
    log.info("%s: going on from step %d", context.label, step)
    return session


def _parent_again(context: StageContext, work: TrainWork, writer: CheckpointWriter) -> Session:
    """Return a session in the parent state, which was kept without its optimizer's state: its segment is trained again.

    The whole state takes the place of the one without. Raises NumericsError when the weights become others.
    """
    kept = context.manifest(work.parent)
    made = work_from_json(kept.spec)
    assert isinstance(made, TrainWork), "a step above 0 is that of a training state"
    before = replace(made, stop=work.start)
    mixed = mixed_in(context, work, kept, work.start)
    log.info("%s: the state at step %d lacks its optimizer's state and is made again", context.label, work.start)
    segment = Segment(again=True)
    try:
        session = _enter(context, before, segment)
    except ArtifactMissing:
        # Absent, it is made by a plan, with all that it is made from.
        context.store.artifacts.discard(work.parent, attempt=kept.attempt)
        raise
    train_segment(context, before, session, segment, writer)
    writer.wait()
    execution = context.execution
    other = context.rank == 0 and not context.manifest(work.parent).resumable
    if other and not (execution.allow_numerics or execution.allow_code):
        raise NumericsError(
            f"the state at step {work.start} became another one when it was made again",
            cause="it was kept without its optimizer's state, and this machine or this code computes other bits",
            hint="run it where it was made; --allow-numerics goes on and marks what is made",
        )
    session.mixed_numerics, session.mixed_code = mixed[0] or session.mixed_numerics, mixed[1] or session.mixed_code
    return session


def _logged(step: int, work: TrainWork, context: StageContext) -> bool:
    total = work.conditions.train.steps
    return step in (1, total) or step % max(1, context.execution.log_every) == 0


def _due(step: int, context: StageContext, segment: Segment, writer: CheckpointWriter) -> bool:
    """Whether this rank wants a periodic checkpoint after the coming step (skipped while two are in flight)."""
    if context.rank > 0 or writer.busy:
        return False
    execution = context.execution
    by_step = execution.checkpoint_steps > 0 and step % execution.checkpoint_steps == 0
    by_time = 0 < execution.checkpoint_seconds <= time.monotonic() - segment.saved
    return by_step or by_time


def _observe(
    context: StageContext, work: TrainWork, trainer: Trainer, segment: Segment, result: StepResult, logged: bool
) -> None:
    """Log the step; raises Diverged or RouterCollapsed."""
    train, now = work.conditions.train, time.monotonic()
    trainer.meter.add(result.values, result.counts_LN)
    rate = (trainer.tokens - segment.marked_tokens) / max(now - segment.marked, 1e-9)
    context.progress(trainer.step, train.steps, loss=result.values["train/loss"], tokens_per_second=rate)
    if not logged:
        return
    segment.marked, segment.marked_tokens = now, trainer.tokens
    lr, router_lr = learning_rates(train, trainer.step - 1)
    row = trainer.meter.take() | result.once
    row |= {"train/lr": lr, "train/router_lr": router_lr, "train/tokens": float(trainer.tokens)}
    coefficients = balance_at(train, trainer.step - 1)
    for name in ("aux", "z"):
        if getattr(train.balance, f"{name}_schedule") != "constant":
            row[f"train/{name}_coef"] = getattr(coefficients, f"{name}_coef")
    for block in trainer.engine.model.moe_blocks[:1]:
        even = balanced_value(train.balance.aux_variant, block.moe.top_k, block.router.num_ids)
        row |= {} if even is None else {"train/aux_loss_balanced": even}
    resident = _resident_gb()
    observed = {"train/tokens_per_second": rate, "system/rss_gb": resident}
    if resident > GROWN * segment.resident_gb + SLACK_GB:
        give_back_freed_memory()
        segment.resident_gb = _resident_gb()
    if not segment.again:
        context.series(trainer.step, row | observed)
    segment.rows.append(json.dumps({"step": trainer.step, "time": time.time(), **row, **observed}))
    moe = trainer.engine.model.spec.moe
    routed = fixed_load(moe)
    vocabulary = vocabulary_size(context, work.tokenizer)
    trainer.meter.judge(
        row, vocabulary, moe.top_k if routed else 0, moe.num_experts, not freezes(train.freeze, "router")
    )


def _state(work: TrainWork, trainer: Trainer, frozen: str, stopping: Stopping) -> dict[str, object]:
    """Return `state.json`: no times, so that equal bits make an equal file."""
    lr, router_lr = learning_rates(work.conditions.train, max(0, trainer.step - 1))
    state: dict[str, object] = {
        "format": STATE_FORMAT,
        "phase": work.conditions.phase,
        "step": trainer.step,
        "total": work.conditions.train.steps,
        "tokens": trainer.tokens,
        "lr": lr,
        "router_lr": router_lr,
        "frozen": work.conditions.train.freeze,
        "frozen_sha256": frozen,
        "meter": trainer.meter.to_json(),
    }
    if work.conditions.train.precision == PRECISION:
        state["loss_scale"] = trainer.scale.to_json()
    if work.conditions.train.stop.metric:
        state["stopping"] = stopping.to_json()
    return state


def _resident_gb() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss) / 1e9
