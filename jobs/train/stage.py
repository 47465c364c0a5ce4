"""The training stage: from the latest committed state on the way, step by step, to the wanted one."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from jobs.data.packing import InstructionBatches, open_batches
from jobs.data.stage import check_epoch
from jobs.models.adapters import add_adapters
from jobs.models.backbones import CausalLM
from jobs.models.building import empty_model
from jobs.models.shards import fetch_shards
from jobs.models.weights import merged
from jobs.moe.balance import balanced_value
from jobs.node import code, numerics
from jobs.node.context import StageContext
from jobs.node.patience import patiently
from jobs.node.preemption import Preempted
from jobs.train.checkpoint import CheckpointWriter
from jobs.train.collaboration import profile_collaboration, profiling_sample
from jobs.train.engine import Engine
from jobs.train.engines.building import build_engine
from jobs.train.errors import FrozenMoved
from jobs.train.freeze import frozen_digest
from jobs.train.loop import StepResult, Trainer
from jobs.train.meter import STATE_FORMAT, Meter, recorded_meter
from jobs.train.schedule import balance_at, learning_rates
from orchestrator.catalog.engines import ENGINES
from orchestrator.catalog.freezing import freezes
from orchestrator.catalog.routers import kind_of
from orchestrator.catalog.selections import SELECTIONS
from orchestrator.errors import ArtifactMissing, CorruptBlob, NumericsError
from orchestrator.spec.identity import lineage, state_keys
from orchestrator.spec.model import Moe
from orchestrator.spec.providers import uses_of
from orchestrator.spec.work import TrainWork, work_from_json
from orchestrator.store import Manifest

log = logging.getLogger(__name__)

# Its pieces are those of one number of processes.
SAME_WORLD = "deepspeed:3"


@dataclass
class Session:
    """A model in training that the next segment of the chain may take over: bit-identical to loading its last state."""

    engine: Engine
    phase: str
    state: str  # key of the state it is in
    step: int
    tokens: int
    meter: Meter
    mixed_numerics: bool = False
    mixed_code: bool = False


@dataclass
class Segment:
    """What one run of a stage has seen so far."""

    rows: list[str] = field(default_factory=list)  # each logged row as JSON
    began: float = field(default_factory=time.monotonic)
    marked: float = field(default_factory=time.monotonic)
    marked_tokens: int = 0
    saved: float = field(default_factory=time.monotonic)


def run(context: StageContext, work: TrainWork) -> None:
    """Train [start, stop); commits the state at `stop`, and periodic ones on the way."""
    with context.job.signals.deferred():
        live = context.job.live
        if "writer" not in live:
            live["writer"] = CheckpointWriter()
            context.job.finishers.append(live["writer"].wait)
        segment = Segment()
        session = _enter(context, work, segment)
        live["training"] = None  # a failure leaves nothing that could be taken over
        train_segment(context, work, session, segment, live["writer"])
        live["training"] = session


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
    source = _source(context, work)
    moe = engine.model.spec.moe
    if session.step == 0 and work.conditions.collaboration_top:
        profile_collaboration(engine.model, profiling_sample(source, train.micro_batch, moe.unit))
    frozen = frozen_digest(engine, train.freeze)
    trainer = Trainer(engine, work.conditions, source, session.step, session.tokens, session.meter)
    first = segment.marked_tokens = trainer.tokens
    begun = saved_step = trainer.step
    while trainer.step < work.stop:
        writer.check()
        context.check()
        if context.world_size == 1 and context.stopping and trainer.step == saved_step:
            raise Preempted(context.job.signals.requested)
        logging_step = _logged(trainer.step + 1, work, context)
        due = _due(trainer.step + 1, context, segment, writer)
        with context.job.watchdog.guard(f"step {trainer.step + 1} of {context.label}"):
            wishes = (context.stopping, due)
            result = trainer.train_step(wishes, router_gradient=logging_step and freezes(train.freeze, "router"))
        stop, save = result.requests
        _observe(context, work, trainer, segment, result, logging_step)
        last = trainer.step == work.stop
        if stop and not context.stopping:
            context.job.signals.requested = "another rank's signal"
        if not (last or stop or save):
            continue
        after = frozen_digest(engine, train.freeze) if last or stop else frozen
        if after != frozen:
            raise FrozenMoved(f"the frozen {train.freeze} changed between steps {work.start} and {trainer.step}")
        elapsed = time.monotonic() - segment.began
        writer.submit(
            context,
            work,
            engine,
            trainer.step,
            _state(work, trainer, frozen),
            segment.rows,
            info={
                "phase": work.conditions.phase,
                "step": trainer.step,
                "total": train.steps,
                "tokens": trainer.tokens,
                "tokens_per_second": (trainer.tokens - first) / max(elapsed, 1e-9),
                "train_seconds": elapsed,
                "steps_run": trainer.step - begun,
                "frozen_sha256": frozen,
                "mixed_numerics": session.mixed_numerics,
                "mixed_code": session.mixed_code,
            },
            metrics={"train_loss": result.values["train/lm_loss"]},
            last=last,
        )
        saved_step, segment.saved = trainer.step, time.monotonic()
        if stop and not last:
            writer.wait()
            raise Preempted(context.job.signals.requested)
    session.state, session.step, session.tokens = work.key(), trainer.step, trainer.tokens


def _enter(context: StageContext, work: TrainWork, segment: Segment) -> Session:
    """Return the session to go on from: the latest committed state, the chain's own, or the parent state."""
    writer: CheckpointWriter = context.job.live["writer"]
    live: Session | None = context.job.live.get("training")
    found = _latest(context, work)
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
            engine = _engine(context, work, live.engine.model)
            return Session(engine, work.conditions.phase, work.parent, 0, 0, Meter(), mixed_code=live.mixed_code)
    writer.wait()
    context.job.live["training"] = None
    del live
    step, key = found or (work.start, work.parent)
    session = load_session(context, work, step, key)
    if step > work.start:
        segment.rows = [json.dumps(row) for row in json.loads(context.fetch(key, "series.json").read_bytes())]
    log.info("%s: going on from step %d", context.label, step)
    return session


def load_session(context: StageContext, work: TrainWork, step: int, key: str) -> Session:
    """Return a session in the committed state `key` at `step` of the work's phase."""
    manifest = context.manifest(key)
    mixed = _mixed(context, work, manifest, step)
    model = empty_model(work.model, vocabulary_size(context, work.tokenizer))
    begun = add_adapters(model, work.conditions.train.adapter, work.conditions.seed)
    weights: Mapping[str, Tensor] = fetch_shards(context, key, "weights")
    if step == 0:  # the state of an earlier phase, whose own adapters are merged
        weights = merged(weights, begun)
    engine = _engine(context, work, model, weights)
    session = Session(engine, work.conditions.phase, key, step, 0, Meter(), *mixed)
    if step > 0:
        state = json.loads(context.fetch(key, "state.json").read_bytes())
        engine.load_optimizer(fetch_shards(context, key, "optimizer"))
        session.tokens = state["tokens"]
        session.meter, sound = recorded_meter(state, lambda steps: _assignments(context, manifest, engine, step, steps))
        if not sound:
            log.warning(
                "%s: the state at step %d, of an earlier version, may have counted later steps in its window of the "
                "series: the next logged row is a mean over the steps from here on",
                context.label,
                step,
            )
    return session


def _mixed(context: StageContext, work: TrainWork, manifest: Manifest, step: int) -> tuple[bool, bool]:
    """Return whether going on from a state mixes numerics, and training code; raises where that was not allowed.

    A phase may begin (step 0) under other numerics and code than made the state before it: the latter is marked.
    """
    uses = uses_of(work, context.execution.engine)
    mixed_code = bool(manifest.info.get("mixed_code")) or code.differing_code(manifest.provenance, uses) is not None
    if step == 0:
        return False, mixed_code
    execution, own, what = context.execution, context.numerics, f"the state at step {step}"
    made = (manifest.numerics.get("engine"), manifest.numerics.get("world_size"))
    if SAME_WORLD in (made[0], execution.engine) and made[1] != context.world_size:
        raise NumericsError(
            f"{what} is of {made[1]} processes under engine {made[0]!r}, and this job has {context.world_size}",
            cause=f"training under engine {SAME_WORLD!r} goes on with the number of processes that it began with",
            hint=f"run the phase with {made[1]} processes, or with engine fsdp or deepspeed:2 from its start; "
            "evaluation and export read the state anywhere",
        )
    if not execution.allow_code:
        code.refuse_other_code(manifest.provenance, what, uses)
    if not execution.allow_numerics:
        numerics.refuse_other(manifest.numerics, own, what)
    if unknown := sorted(own.keys() - manifest.numerics.keys()):
        log.warning("%s: %s does not say its %s, which is not compared", context.label, what, ", ".join(unknown))
    mixed = bool(manifest.info.get("mixed_numerics")) or bool(numerics.differing(manifest.numerics, own))
    return mixed, mixed_code


def _fixed_load(moe: Moe) -> bool:
    """Return whether every token is assigned to the same number of experts."""
    return moe.choice == "token" and kind_of(moe).routes and SELECTIONS.get(moe.selection).fixed


def _assignments(context: StageContext, manifest: Manifest, engine: Engine, step: int, steps: int) -> int | None:
    """Return how many tokens each layer assigned to experts in the `steps` steps before `step`, times k, if fixed."""
    made, moe = work_from_json(manifest.spec), engine.model.spec.moe
    if not _fixed_load(moe) or not isinstance(made, TrainWork) or step - steps < made.start:
        return None
    source, train = _source(context, made), made.conditions.train
    batches = ((at, index) for at in range(step - steps, step) for index in range(train.accumulation))
    tokens = sum(int(source.micro_batch(*batch, train.micro_batch).attention_mask.sum()) for batch in batches)
    return moe.top_k * tokens


def _latest(context: StageContext, work: TrainWork) -> tuple[int, str] | None:
    """Return (step, key) of the latest sound committed state strictly between start and stop."""
    steps = range(work.start + 1, work.stop)
    if not steps:
        return None
    *history, (conditions, start, _) = lineage(work.spans)
    keys = dict(zip(state_keys(work.init, history, conditions, start, steps), steps, strict=True))
    existing = patiently(context.store.artifacts.keys, "list of states") & keys.keys()
    for step, key in sorted(((keys[key], key) for key in existing), reverse=True):
        try:
            context.fetch_all(key, [blob.name for blob in context.manifest(key).blobs])
        except (CorruptBlob, ArtifactMissing) as error:
            log.warning("%s: the state at step %d is damaged (%s); taking an earlier one", context.label, step, error)
            if context.rank == 0:
                context.store.artifacts.heal(key)
            context.job.manifests.pop(key, None)
            continue
        return step, key
    return None


def _engine(
    context: StageContext, work: TrainWork, model: CausalLM, weights: Mapping[str, Tensor] | None = None
) -> Engine:
    execution, train = context.execution, work.conditions.train
    return build_engine(execution.engine, model, train, context.rank, context.world_size, weights, execution.device)


def _source(context: StageContext, work: TrainWork) -> Any:
    train = work.conditions.train
    info = context.manifest(work.conditions.tokens).info
    ranges: dict[str, list[int]] = info.get("corpora", {})
    batches = open_batches(
        train.data.format,
        context.directory(work.conditions.tokens),
        train.sequence_length,
        work.conditions.seed,
        accumulation=train.accumulation,
        loss=train.loss,
        pad=int(info.get("pad", 0)),
        corpora=[(*ranges[name], share) for name, share in train.data.weights.items()],
    )
    if isinstance(batches, InstructionBatches):
        check_epoch(train.data, batches.examples)
    return batches


def vocabulary_size(context: StageContext, tokenizer: str) -> int:
    """Return the number of token ids of a tokenizer artifact."""
    return int(context.manifest(tokenizer).info["vocab_size"])


def _logged(step: int, work: TrainWork, context: StageContext) -> bool:
    total = work.conditions.train.steps
    return step == 1 or step == total or step % max(1, context.execution.log_every) == 0


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
    observed = {"train/tokens_per_second": rate, "system/rss_gb": _resident_gb()}
    context.series(trainer.step, row | observed)
    segment.rows.append(json.dumps({"step": trainer.step, "time": time.time(), **row, **observed}))
    moe = trainer.engine.model.spec.moe
    routed = _fixed_load(moe)
    vocabulary = vocabulary_size(context, work.tokenizer)
    trainer.meter.judge(
        row, vocabulary, moe.top_k if routed else 0, moe.num_experts, not freezes(train.freeze, "router")
    )


def _state(work: TrainWork, trainer: Trainer, frozen: str) -> dict[str, Any]:
    """Return `state.json`: no times, so that equal bits make an equal file."""
    lr, router_lr = learning_rates(work.conditions.train, max(0, trainer.step - 1))
    return {
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


def _resident_gb() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss) / 1e9
