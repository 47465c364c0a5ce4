"""Runs stages through the real node entry (`jobs.run`) in this process, on a store in a folder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from jobs.node.preemption import Signals
from jobs.run import run_job
from orchestrator.spec.cell import Execution, Resources
from orchestrator.spec.identity import plain
from orchestrator.spec.work import Work, work_to_json
from orchestrator.store import Manifest, Store

_batches = itertools.count()


def submit(store: Store, works: Sequence[Work], **execution: Any) -> tuple[str, str]:
    """Claim `works` for one job and write its submission; return (batch, attempt)."""
    batch = f"test-{next(_batches)}"
    attempt = f"{batch}-0"
    for work in works:
        assert store.claims.claim(work.key(), attempt, 600.0) is not None
    settings = plain(Execution(**execution))
    del settings["resources"]
    stages = [{"key": w.key(), "label": w.kind, "phase": "", "cells": [], "work": work_to_json(w)} for w in works]
    job = {
        "attempt": attempt,
        "label": "test",
        "resources": plain(Resources()),
        "execution": settings,
        "stages": stages,
    }
    store.put_json(f"submissions/{batch}.json", {"format": 1, "batch": batch, "grid": "test", "jobs": [job]})
    return batch, attempt


def run_stages(store: Store, works: Sequence[Work], **execution: Any) -> list[Manifest]:
    """Run `works` as one job and return their manifests; fails with the recorded failure."""
    batch, attempt = submit(store, works, **execution)
    code = run_job(store.url, batch, 0, Signals())
    assert code == 0, store.get_json(f"attempts/{attempt}/failure.json")
    manifests = [store.artifacts.get(work.key()) for work in works]
    assert all(manifest is not None for manifest in manifests)
    return [manifest for manifest in manifests if manifest is not None]
