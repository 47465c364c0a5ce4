"""A store with tiny tokens and a tokenizer, and jobs over it: what the training tests share."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs.models.shards import Shards, shard_names, tensors_digest, weight_names
from jobs.node.context import Job, StageContext
from jobs.node.preemption import Signals
from jobs.node.reporter import Reporter
from orchestrator.plan.phases import before_finetuning
from orchestrator.spec.cell import BalanceSpec, DataSpec, Execution, Resources, TrainSpec
from orchestrator.spec.identity import plain
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.work import Conditions, InitWork, TrainWork, Work, work_to_json
from orchestrator.store import Manifest, Store

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 64
EXECUTION = Execution(log_every=4, checkpoint_seconds=0.0)
MODEL = ModelSpec(
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    context=32,
    moe=MoESpec(top_k=2, num_experts=4, expert_width=32),
)
TRAIN = TrainSpec(
    data=DataSpec("test://tiny"),
    steps=16,
    micro_batch=2,
    accumulation=2,
    sequence_length=16,
    lr=1e-2,
    expert_dropout=0.1,
    balance=BalanceSpec(bias_rate=0.01),
)


def key(*parts: object) -> str:
    """Return a key that looks like an artifact's."""
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()


TOKENIZER = key("tokenizer")


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def put(store: Store, name: str, kind: str, blobs: dict[str, bytes], info: dict[str, Any]) -> str:
    """Commit an artifact that no stage made."""
    written = tuple(store.artifacts.write_blob("fixtures", blob, data) for blob, data in blobs.items())
    store.artifacts.commit(Manifest(key(name), kind, {"kind": kind}, blobs=written, info=info))
    return key(name)


def prepare(url: str) -> Store:
    """Return a store that holds a tokenizer, a text (a noisy cycle, quickly learned) and instructions."""
    store = Store.open(url)
    put(store, "tokenizer", "tokenizer", {"special.json": b"{}"}, {"vocab_size": VOCABULARY})
    generator = np.random.default_rng(0)
    tokens = (np.arange(4000) * 3 + generator.integers(0, 3, 4000)) % VOCABULARY
    starts = generator.random(4000) < 0.3
    text = {"tokens": tokens.astype(np.uint16), "spans_word": starts, "spans_sentence": starts}
    put(store, "text", "tokens", {f"train_{n}.npy": _npy(a) for n, a in text.items()}, {"pad": 0})
    offsets = np.arange(0, 4001, 10)
    mask = np.arange(4000) % 10 >= 6
    examples = {**text, "offsets": offsets, "loss_mask": mask}
    put(store, "instructions", "tokens", {f"train_{n}.npy": _npy(a) for n, a in examples.items()}, {"pad": 0})
    return store


def init_work(model: ModelSpec = MODEL) -> InitWork:
    """Return the init work of `model`."""
    return InitWork(resolve_model(model), TOKENIZER, 0)


def segments(
    schedule: Sequence[tuple[str, int, int]],
    train: TrainSpec = TRAIN,
    *,
    model: ModelSpec = MODEL,
    phase: str = "pretrain",
    tokens: str = "text",
    after: TrainWork | None = None,
) -> list[TrainWork]:
    """Return the works of a phase cut into (frozen role, start, stop), after the last work of an earlier phase."""
    history = after.spans if after else ()
    resolved = resolve_model(model)
    init, limit = init_work(before_finetuning(resolved)).key(), 0
    if phase == "finetune":
        limit = resolved.moe.collaboration_top
    else:
        resolved = before_finetuning(resolved)
    works = []
    for frozen, start, stop in schedule:
        conditions = Conditions(phase, dataclasses.replace(train, freeze=frozen), key(tokens), 0, limit)
        works.append(TrainWork(resolved, TOKENIZER, init, history, conditions, start, stop))
        history = works[-1].spans
    return works


def make_job(store: Store, works: Sequence[Work], attempt: str = "a-0", **changes: Any) -> Job:
    """Return a job that holds the leases of `works`, for running stages inside the test's process."""
    for work in works:
        assert store.claims.claim(work.key(), attempt, 60.0) is not None
    reporter = Reporter(store, attempt)
    for work in works:
        reporter.hold(store.claims.enter(work.key(), attempt))
    fields = {"execution": EXECUTION, "resources": Resources(cores=1), **changes}
    scratch = Path(tempfile.mkdtemp(prefix="moegrid-test-"))
    job = Job(store, attempt, scratch=scratch, signals=Signals(), reporter=reporter, **fields)
    weakref.finalize(job, shutil.rmtree, scratch, ignore_errors=True)
    return job


def run_chain(
    store: Store, works: Sequence[Work], attempt: str = "a-0", *, light: Collection[Work] = (), **changes: Any
) -> Job:
    """Run `works` as one chain inside the test's process and wait for what it commits.

    States of `light` ones are kept without the optimizer's state.
    """
    from jobs.run import stage_function

    job = make_job(store, works, attempt, **changes)
    try:
        for work in works:
            stage_function(work)(StageContext(job, work.key(), work.kind, moments=work not in light), work)
    finally:
        for finish in job.finishers:
            finish()
        for work in works:
            lease = job.reporter.drop(work.key())
            if lease is not None:
                store.claims.release(lease)
    return job


def weights(store: Store, key: str) -> str:
    """Return the digest of a state's weights."""
    manifest = store.artifacts.get(key)
    assert manifest is not None
    return str(manifest.info["weights_sha256"])


def tensors(store: Store, key: str, kind: str) -> dict[str, torch.Tensor]:
    """Return all of a state's `weights`, wherever they lie, or of its `optimizer`'s tensors (store in a folder)."""
    manifest = store.artifacts.get(key)
    assert manifest is not None
    groups = weight_names(manifest) if kind == "weights" else [shard_names(manifest, kind)]
    paths = [[store.objects.local_path(manifest.blob(name).path) for name in names] for names in groups]
    return dict(Shards(*([path for path in group if path is not None] for group in paths)))


def state_bits(store: Store, key: str) -> dict[str, str]:
    """Return the checksums of everything in a state that a later step depends on, wherever it lies."""
    manifest = store.artifacts.get(key)
    assert manifest is not None
    aside = ("series.json", "tensors.json", "files.json", "weights", "kept-")
    bits = {blob.name: blob.sha256 for blob in manifest.blobs if not blob.name.startswith(aside)}
    return {**bits, "weights": tensors_digest(tensors(store, key, "weights"))}


def submit(
    store: Store,
    works: Sequence[Work],
    attempt: str = "batch-0",
    *,
    resources: Resources | None = None,
    execution: Execution = EXECUTION,
    ttl: float = 60.0,
    light: Collection[Work] = (),
) -> list[str]:
    """Claim `works`, write a submission for one job and return the command line that runs it.

    States of `light` ones are kept without the optimizer's state.
    """
    for work in works:
        assert store.claims.claim(work.key(), attempt, ttl) is not None
    settings = {name: value for name, value in plain(execution).items() if name != "resources"}
    job = {
        "attempt": attempt,
        "label": "test",
        "resources": plain(resources or Resources()),
        "execution": settings,
        "stages": [
            {"key": w.key(), "label": w.kind, "work": work_to_json(w), "moments": w not in light} for w in works
        ],
    }
    store.put_json(f"submissions/{attempt}.json", {"format": 1, "batch": attempt, "jobs": [job]})
    return [sys.executable, "-m", "jobs.run", "--store", store.url, "--batch", attempt, "--job", "0"]


def start(command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
    """Start a node process from the project's root."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def failure(store: Store, attempt: str = "batch-0") -> dict[str, Any]:
    """Return the failure record of an attempt."""
    data = store.objects.get(f"attempts/{attempt}/failure.json")
    assert data is not None
    return dict(json.loads(data))
