"""Bytes that a cell of a grid writes as states: by the rule that keeps every state whole, against the present one.

At tiny both rules write the states of one seed's cells in one run, each segment cut to one step: no byte depends on how
many there are. At paper the bytes are reckoned as `moegrid plan` does.

python -m benchmarks.store_bytes [GRID]
"""

from __future__ import annotations

import argparse
import io
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jobs.node.context import Job, StageContext
from jobs.node.preemption import Signals
from jobs.node.reporter import Reporter
from jobs.run import stage_function
from jobs.train import kept
from orchestrator.grid.load import load_grid
from orchestrator.plan.cost import parameters
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.moments import SINGLE, keeps_moments, moments_bytes
from orchestrator.plan.plan import make_plan
from orchestrator.plan.stored import HALF, State, begun, following, stored
from orchestrator.spec.cell import Execution, Resources
from orchestrator.spec.work import TokensWork, TrainWork
from orchestrator.store import Manifest, Store
from orchestrator.store.manifest import LEAST_KEPT

SHORT = ("set.finetune.steps=2", "set.pretrain.steps=1", "set.tokenizer.vocab_size=4096")
TOKENS, EXAMPLE = 200_000, 100


def prepare(store: Store, graph: StageGraph) -> None:
    """Commit made-up tokens and tokenizers in the place of the graph's."""
    random = np.random.default_rng(0)
    for key, stage in graph.stages.items():
        arrays: dict[str, np.ndarray[tuple[int], np.dtype[np.generic]]] = {}
        if isinstance(stage.made, TokensWork):
            marks = random.random(TOKENS) < 0.3
            arrays = {"tokens": random.integers(0, 4096, TOKENS).astype(np.uint16)}
            arrays |= {"spans_word": marks, "spans_sentence": marks, "loss_mask": ~marks}
            arrays["offsets"] = np.arange(0, TOKENS + 1, EXAMPLE)
        if stage.kind not in ("tokens", "tokenizer"):
            continue
        blobs = [store.artifacts.write_blob("made-up", "special.json", b"{}")]
        for name, array in arrays.items():
            sink = io.BytesIO()
            np.save(sink, array)
            blobs.append(store.artifacts.write_blob("made-up", f"train_{name}.npy", sink.getvalue()))
        info = {"vocab_size": 4096, "pad": 0}
        store.artifacts.commit(Manifest(key, stage.kind, {"kind": stage.kind}, blobs=tuple(blobs), info=info))


def written(graph: StageGraph, folder: Path, *, earlier: bool) -> int:
    """Train the graph's states into a store in `folder`; return the bytes of the last phase's, each file once."""
    kept.LEAST_KEPT = math.inf if earlier else LEAST_KEPT  # type: ignore[attr-defined]
    store = Store.open(str(folder))
    prepare(store, graph)
    todo = {key: stage for key, stage in graph.stages.items() if stage.kind in ("init", "train")}
    for number, (key, stage) in enumerate(todo.items()):
        attempt = f"a-{number}"
        assert store.claims.claim(key, attempt, 600.0) is not None
        reporter = Reporter(store, attempt)
        reporter.hold(store.claims.enter(key, attempt))
        scratch = Path(tempfile.mkdtemp(dir=folder))
        execution, resources = Execution(checkpoint_seconds=0.0), Resources(cores=2)
        job = Job(store, attempt, execution, resources, scratch, Signals(), reporter)
        context = StageContext(job, key, stage.label, moments=earlier or keeps_moments(graph, key))
        stage_function(stage.work)(context, stage.work)
        for finish in job.finishers:
            finish()
        shutil.rmtree(scratch)
    manifests = store.artifacts.many(key for key, stage in todo.items() if stage.phase == "finetune").values()
    # Files of an earlier phase are no bytes of this one.
    own = {blob.path: blob.size for one in manifests for blob in one.blobs if f"/{one.attempt}/" in f"/{blob.path}"}
    return sum(own.values())


def earlier_bytes(graph: StageGraph) -> int:
    """Return the bytes of all states when each is whole and holds all weights, from shapes alone."""
    total, states = 0, dict[str, State]()
    for key, stage in graph.stages.items():
        vocabulary, work = graph.vocabulary(key), stage.made
        if stage.kind == "init":
            states[key] = begun(parameters(stage.work.model, vocabulary).roles)  # type: ignore[union-attr]
        if not isinstance(work, TrainWork):
            continue
        train, sizes = work.conditions.train, parameters(work.model, vocabulary).roles
        states[key] = following(states[stage.parents[0]], train, sizes, begins=work.start == 0, whole=True)
        width = HALF + SINGLE if train.precision == "bf16" else SINGLE  # weights, and their masters
        total += width * sum(sizes.values()) + moments_bytes(train, sizes, states[key].trained)
    return total


def main() -> int:
    """Print both ratios; return 1 where one is above what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", nargs="?", default="finetune_freeze")
    name = parser.parse_args().grid
    small = build_graph(load_grid(name, scale="tiny", overrides=SHORT, seeds=[0]))
    with tempfile.TemporaryDirectory() as folder:
        before, after = (written(small, Path(folder) / str(rule), earlier=rule) for rule in (True, False))
    cells = len(small.cells)
    rows: Mapping[str, tuple[float, float, int, float]] = {"tiny, written": (before, after, cells, 0.6)}
    large = build_graph(load_grid(name, scale="paper"))
    plan = make_plan(large, ())
    states = sum(sum(kinds.values()) for phase, kinds in stored(plan).items() if phase in ("pretrain", "finetune"))
    rows = {**rows, "paper, reckoned": (earlier_bytes(large), states, len(large.cells), 0.35)}
    print(f"{name}: bytes of training states a cell")
    print(f"{'':<18}{'every state whole':>20}{'as it is':>14}{'ratio':>8}{'at most':>9}")
    for label, (old, new, count, limit) in rows.items():
        print(f"{label:<18}{old / count / 1e6:>17,.1f} MB{new / count / 1e6:>11,.1f} MB{new / old:>8.3f}{limit:>9}")
    return int(any(new > limit * old for old, new, _, limit in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
