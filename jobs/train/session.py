"""A model in training, and the committed state that it goes on from."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from jobs.data.packing import InstructionBatches, open_batches
from jobs.data.stage import check_epoch
from jobs.models.adapters import add_adapters
from jobs.models.backbones import CausalLM
from jobs.models.building import empty_model
from jobs.models.shards import fetch_shards, shard_names, share_of, weight_names
from jobs.models.weights import merged
from jobs.node import code, numerics
from jobs.node.context import StageContext
from jobs.node.patience import patiently
from jobs.train.engine import Engine
from jobs.train.engines.building import build_engine
from jobs.train.meter import Meter, recorded_meter
from jobs.train.scale import LossScale
from jobs.train.stopping import Stopping
from orchestrator.catalog.engines import ENGINES, of_any_world
from orchestrator.catalog.overflows import NONE
from orchestrator.catalog.routers import kind_of
from orchestrator.catalog.selections import SELECTIONS
from orchestrator.errors import ArtifactMissing, CorruptBlob, NumericsError
from orchestrator.spec.identity import lineage, state_keys
from orchestrator.spec.model import Moe
from orchestrator.spec.providers import uses_of
from orchestrator.spec.work import TrainWork, work_from_json
from orchestrator.store import Manifest
from orchestrator.store.manifest import FILES

log = logging.getLogger(__name__)


@dataclass
class Session:
    """A model in training that the next segment of the chain may take over: bit-identical to loading its last state."""

    engine: Engine
    phase: str
    state: str  # key of the state it is in
    step: int
    tokens: int
    meter: Meter
    scale: LossScale
    stopping: Stopping
    mixed_numerics: bool = False
    mixed_code: bool = False
    saved: float | None = None  # when the last state with its moments was kept, where its own state has none


def load_session(context: StageContext, work: TrainWork, step: int, key: str) -> Session:
    """Return a session in the committed state `key` at `step` of the work's phase."""
    manifest = context.manifest(key)
    mixed = mixed_in(context, work, manifest, step)
    model = empty_model(work.model, vocabulary_size(context, work.tokenizer))
    begun = add_adapters(model, work.conditions.train.adapter, work.conditions.seed)
    model.recompute = context.execution.recompute
    engine_kind = ENGINES.get(context.execution.engine)
    cut = engine_kind.shares if context.world_size > 1 and engine_kind.reads_weights else ()
    if cut:
        _read_together(context, work, key, moments=step > 0)
    weights: Mapping[str, Tensor] = fetch_shards(context, key, "weights", some="weights" in cut)
    if step == 0:  # the state of an earlier phase, whose own adapters are merged
        weights = merged(weights, begun)
    engine = engine_over(context, work, model, weights)
    begun_scale = LossScale.of(work.conditions.train.precision)
    session = Session(engine, work.conditions.phase, key, step, 0, Meter(), begun_scale, Stopping(), *mixed)
    if step > 0:
        state = json.loads(context.fetch(key, "state.json").read_bytes())
        engine.load_optimizer(fetch_shards(context, key, "optimizer", some="optimizer" in cut))
        session.tokens = state["tokens"]
        session.stopping = Stopping.from_json(state.get("stopping"))
        if "loss_scale" in state:
            session.scale = LossScale.from_json(state["loss_scale"])
        session.meter, sound = recorded_meter(state, lambda steps: _assignments(context, manifest, engine, step, steps))
        if not sound:
            log.warning(
                "%s: the state at step %d, of an earlier version, may have counted later steps in its window of the "
                "series: the next logged row is a mean over the steps from here on",
                context.label,
                step,
            )
    return session


def mixed_in(context: StageContext, work: TrainWork, manifest: Manifest, step: int) -> tuple[bool, bool]:
    """Return whether going on from a state mixes numerics, and training code; raises where that was not allowed.

    A phase may begin (step 0) under other numerics and code than made the state before it: the latter is marked.
    """
    uses = uses_of(work, context.execution.engine)
    mixed_code = bool(manifest.info.get("mixed_code")) or code.differing_code(manifest.provenance, uses) is not None
    if step == 0:
        return False, mixed_code
    execution, own, what = context.execution, context.numerics, f"the state at step {step}"
    refuse_other_world(manifest, execution.engine, context.world_size, what)
    if not execution.allow_code:
        code.refuse_other_code(manifest.provenance, what, uses)
    if not execution.allow_numerics:
        numerics.refuse_other(manifest.numerics, own, what)
    if unknown := sorted(own.keys() - manifest.numerics.keys() - numerics.UNSAID.keys()):
        log.warning("%s: %s does not say its %s, which is not compared", context.label, what, ", ".join(unknown))
    mixed = bool(manifest.info.get("mixed_numerics")) or bool(numerics.differing(manifest.numerics, own))
    return mixed, mixed_code


def refuse_other_world(manifest: Manifest, engine: str, world_size: int, what: str) -> None:
    """Raise NumericsError where one of both engines keeps its optimizer for one number of processes, and that differs.

    An engine that is not known here, of a package that is not installed, made a state for any number of them.
    """
    made, processes = str(manifest.numerics.get("engine")), manifest.numerics.get("world_size")
    bound = [name for name in (made, engine) if name in ENGINES and ENGINES.get(name).same_world]
    if bound and processes != world_size:
        raise NumericsError(
            f"{what} is of {processes} processes under engine {made!r}, and this job has {world_size}",
            cause=f"training under engine {bound[0]!r} goes on with the number of processes that it began with",
            hint=f"run the phase with {processes} processes, or with engine {' or '.join(of_any_world())} from its "
            "start; evaluation and export read the state anywhere",
        )


def fixed_load(moe: Moe) -> bool:
    """Return whether every token is assigned to the same number of experts."""
    fixed = SELECTIONS.get(moe.selection).fixed and moe.overflow == NONE
    return moe.choice == "token" and kind_of(moe).routes and fixed


def _assignments(context: StageContext, manifest: Manifest, engine: Engine, step: int, steps: int) -> int | None:
    """Return how many tokens each layer assigned to experts in the `steps` steps before `step`, times k, if fixed."""
    made, moe = work_from_json(manifest.spec), engine.model.spec.moe
    if (
        not fixed_load(moe)
        or engine.model.vision is not None
        or not isinstance(made, TrainWork)
        or step - steps < made.start
    ):
        return None
    source, train = training_source(context, made), made.conditions.train
    batches = ((at, index) for at in range(step - steps, step) for index in range(train.accumulation))
    tokens = sum(int(source.micro_batch(*batch, train.micro_batch).attention_mask.sum()) for batch in batches)
    return moe.top_k * tokens


def latest_state(context: StageContext, work: TrainWork) -> tuple[int, str] | None:
    """Return (step, key) of the latest sound committed state between start and stop from which training can go on.

    Every rank reads its own files and a share of the others, and all decide together: a state is read once.
    """
    steps = range(work.start + 1, work.stop)
    if not steps:
        return None
    *history, (conditions, start, _) = lineage(work.spans)
    keys = dict(zip(state_keys(work.init, history, conditions, start, steps), steps, strict=True))
    place = f"{context.stage}/{work.key()}"
    listed = ""
    if context.rank == 0:
        existing = patiently(context.store.artifacts.keys, "list of states") & keys.keys()
        listed = json.dumps(sorted(((keys[key], key) for key in existing), reverse=True))
    for step, key in json.loads(_said(context, f"states/{place}", listed)[0]):
        words = _said(context, f"sound/{place}/{key}", _verdict(context, key))
        if all(word == "sound" for word in words):
            return step, key
        context.job.manifests.pop(key, None)
        if damaged := next((word for word in words if word not in ("sound", "light")), ""):
            log.warning("%s: the state at step %d is damaged (%s); taking an earlier one", context.label, step, damaged)
            if context.rank == 0:  # after all have read it: nobody waits for one that finds it gone
                context.store.artifacts.heal(key)
    return None


def _said(context: StageContext, name: str, word: str) -> list[str]:
    """Return what each rank said under `name`."""
    if context.world_size == 1:
        return [word]
    from jobs.node.ranks import said

    return said(name, word, context.rank, context.world_size, context.check)


def _verdict(context: StageContext, key: str) -> str:
    """Read this rank's share of a state: "sound", "light" (training cannot go on from it), or what is wrong with it."""
    try:
        manifest = context.manifest(key)
        if not manifest.resumable:
            return "light"
        names = [blob.name for blob in manifest.blobs]
        context.fetch_all(key, share_of(names, context.rank, context.world_size))
    except (CorruptBlob, ArtifactMissing) as error:
        return str(error)
    return "sound"


def _read_together(context: StageContext, work: TrainWork, key: str, *, moments: bool) -> None:
    """Read the files of a state with tensors, each by one rank; CorruptBlob on all ranks when one of them met it.

    Of an engine's collectives none has begun: there a rank that misses is an error of its own to all others, and one
    whose files come slowly is taken for hanging.
    """
    manifest = context.manifest(key)
    names = [name for group in weight_names(manifest) for name in group]
    names += shard_names(manifest, "optimizer") if moments else []
    names += [blob.name for blob in manifest.blobs if blob.name == FILES]
    met = ""
    try:
        context.fetch_all(key, share_of(names, context.rank, context.world_size))
    except CorruptBlob as error:
        met = json.dumps([error.artifact, error.path, error.cause])
    if told := next(filter(None, _said(context, f"read/{context.stage}/{work.key()}/{key}", met)), ""):
        artifact, path, cause = json.loads(told)
        raise CorruptBlob(artifact, path, cause)


def engine_over(
    context: StageContext, work: TrainWork, model: CausalLM, weights: Mapping[str, Tensor] | None = None
) -> Engine:
    execution, train = context.execution, work.conditions.train
    place = (context.rank, context.world_size)
    return build_engine(execution.engine, model, train, *place, weights, execution.device, execution.parallel)


def training_source(context: StageContext, work: TrainWork) -> Any:
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
        features=context.fetch(features, "features.npy") if (features := work.conditions.features) else None,
    )
    if isinstance(batches, InstructionBatches):
        check_epoch(train.data, batches.examples)
    return batches


def vocabulary_size(context: StageContext, tokenizer: str) -> int:
    """Return the number of token ids of a tokenizer artifact."""
    return int(context.manifest(tokenizer).info["vocab_size"])
