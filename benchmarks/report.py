"""Report and MLflow of large grids from a store alone: no tracker is asked, no checkpoint is read.

    make bench            # or: .venv/bin/python benchmarks/report.py [--cells 36] [--tracked 500]

The stores are filled by the project's own commit code with made-up results of the sizes that real ones have: the grid
`finetune_freeze` with probes, 300 items a task, 400 steps a phase of which every tenth is logged, 16 experts in 4
layers. Times are of whole commands, process start included; beside them, for scale, what importing their libraries
takes on this machine, and what MLflow takes for a point that is logged by a call of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.root import root_digest, root_document
from orchestrator.plan.stage import Stage
from orchestrator.spec.work import EvaluateWork, TrainWork
from orchestrator.store import Manifest, Store

ROOT = Path(__file__).resolve().parent.parent
GRID = "finetune_freeze"
SETTINGS = 12
SUITES = ["lm", "reasoning", "efficiency", "probe"]
EVERY, ITEMS, LAYERS, EXPERTS = 10, 300, 4, 16
NUMERICS = {"device": "cpu", "torch": "2.13.0", "threads": 1, "world_size": 1, "engine": "torch"}
INTERVENTIONS = ("base", "pruned", "random_0", "random_1", "random_2")


def overrides(cells: int) -> list[str]:
    """Return the words that give the grid this many cells: twelve settings over as many seeds as it takes."""
    seeds = list(range(-(-cells // SETTINGS)))
    return [f"factors.seed={json.dumps(seeds)}", f"evaluate={json.dumps(SUITES)}", "set.finetune.steps=400"]


def fill(store: Store, cells: int) -> StageGraph:
    """Commit every stage of the grid; return the graph."""
    graph = build_graph(load_grid(GRID, overrides=overrides(cells)))
    store.write_root(GRID, root_digest(graph), root_document(graph))
    items = parquet()
    store.objects.parallel(lambda key: commit(store, graph, key, items), list(graph.stages))
    return graph


def commit(store: Store, graph: StageGraph, key: str, items: bytes) -> None:
    """Commit one stage with the blobs that a reader of results opens, and metrics that differ by seed."""
    stage, chance = graph.stages[key], random.Random(key)
    blobs: dict[str, bytes] = {}
    metrics: dict[str, float] = {}
    info: dict[str, object] = {"seconds": 60.0}
    if isinstance(stage.work, TrainWork):
        rows = [row(step, chance) for step in range(stage.work.start + EVERY, stage.work.stop + 1, EVERY)]
        blobs["series.json"] = json.dumps({"rows": rows}).encode()
        info = {"train_seconds": 60.0, "weights_sha256": key, "step": stage.work.stop}
    if isinstance(stage.work, EvaluateWork):
        metrics, info = measured(stage, chance)
        if stage.work.suite in ("reasoning", "efficiency"):
            blobs["items.parquet"] = items
        if stage.work.suite == "probe":
            blobs["probe.npz"] = arrays(int(key[:8], 16))
    written = tuple(store.artifacts.write_blob("filled-0", name, body) for name, body in blobs.items())
    store.artifacts.commit(
        Manifest(key, stage.kind, {}, {}, NUMERICS, {"git": "c0ffee" * 6}, "filled-0", 0, written, metrics, info, 1.7e9)
    )


def row(step: int, chance: random.Random) -> dict[str, float]:
    """Return one logged step with as many metrics as a training stage logs."""
    names = ["lm_loss", "aux_loss", "z_loss", "grad_norm", "lr", "router_lr", "tokens", "tokens_per_second"]
    found = {f"train/{name}": 1 + chance.random() for name in names}
    loss = 6.0 - 0.002 * step + 0.05 * chance.random()
    return {"step": step, "time": 1.7e9 + step, "train/loss": loss, "routing/load_balance": 2.8, **found}


def measured(stage: Stage, chance: random.Random) -> tuple[dict[str, float], dict[str, object]]:
    """Return the metrics and facts of one evaluation."""
    assert isinstance(stage.work, EvaluateWork)
    tasks, noise = [task.name for task in stage.work.tasks], chance.gauss(0, 0.01)
    if stage.work.suite == "lm":
        return {"val_loss": 5.4 + noise, "bits_per_byte": 2.2 + noise}, {"seconds": 60.0}
    if stage.work.suite == "probe":
        names = ["probe_load_balance", "router_margin", "expert_weight_entropy", "routing_distance"]
        return {f"{task}/{name}": 0.5 + noise for task in tasks for name in names}, {"seconds": 60.0}
    counts = [[chance.randrange(200, 900) for _ in range(EXPERTS)] for _ in range(LAYERS)]
    if stage.work.suite == "efficiency":
        names = ["load_balance", "collaboration", "capacity", "specialization", "capacity_bpb", "specialization_bpb"]
        return dict.fromkeys(names, 0.1 + noise), {"seconds": 60.0, "expert_counts": counts}
    accuracies = {f"{task}/{name}": 0.25 + noise for task in tasks for name in ("acc", "acc_norm")}
    scores = {f"{task}/answer_bpb": 2.4 + noise for task in tasks}
    info = {
        "seconds": 60.0,
        "stderr": dict.fromkeys(accuracies, 0.025),
        "n": dict.fromkeys(accuracies, ITEMS),
        "chance": dict.fromkeys(accuracies, 0.25),
    }
    return {**accuracies, **scores, "answer_bpb": 2.4 + noise, "reasoning_avg": 0.25 + noise}, info


def parquet() -> bytes:
    """Return item scores as an evaluation stores them."""
    tasks = ("winogrande", "hellaswag", "arc_easy", "arc_challenge", "piqa")
    keys = [(task, str(item), name) for name in INTERVENTIONS for task in tasks for item in range(ITEMS)]
    rng = np.random.default_rng(0)
    columns = {
        "task": [task for task, _, _ in keys],
        "item": [item for _, item, _ in keys],
        "scores": [list(rng.normal(-20, 5, 4)) for _ in keys],
        "target": [0] * len(keys),
        "acc": (rng.random(len(keys)) < 0.25).astype(float),
        "acc_norm": (rng.random(len(keys)) < 0.25).astype(float),
        "answer_bpb": rng.normal(2.4, 0.5, len(keys)),
        "intervention": [name for _, _, name in keys],
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return bytes(sink.getvalue().to_pybytes())


def arrays(seed: int) -> bytes:
    """Return the arrays of a probe."""
    rng = np.random.default_rng(seed)
    square = (LAYERS, EXPERTS, EXPERTS)
    sink = io.BytesIO()
    found: dict[str, NDArray[np.number]] = {
        "heldout.counts": rng.integers(100, 900, square[:2]),
        "heldout.pairs": rng.integers(1, 500, square) + 900 * np.eye(EXPERTS, dtype=np.int64),
        "sample": np.argsort(rng.random((LAYERS, 4096, EXPERTS)), axis=-1)[..., :2].astype(np.int16),
        "weight_similarity": rng.uniform(-0.1, 0.1, square),
        "output_similarity": rng.uniform(-0.1, 0.9, square),
    }
    np.savez_compressed(sink, allow_pickle=False, **found)
    return sink.getvalue()


def seconds(*words: str) -> float:
    """Return the time of a command."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *words], check=True, env=environment, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def counts(tracker: str) -> tuple[int, int]:
    """Return how many runs and points a SQLite tracker holds."""
    with contextlib.closing(sqlite3.connect(tracker.removeprefix("sqlite:///"))) as database:
        runs = database.execute("select count(*) from runs").fetchone()[0]
        return runs, database.execute("select count(*) from metrics").fetchone()[0]


def one_by_one(tracker: str, points: int = 200) -> float:
    """Return the seconds that MLflow takes for a point logged by a call of its own."""
    from mlflow import MlflowClient

    client = MlflowClient(tracker)
    run = client.create_run(client.create_experiment("one-by-one")).info.run_id
    began = time.perf_counter()
    for step in range(points):
        client.log_metric(run, "loss", 1.0, step=step)
    return (time.perf_counter() - began) / points


def main() -> None:
    """Fill two stores, time the commands, print what they took."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cells", type=int, default=36)
    parser.add_argument("--tracked", type=int, default=500)
    parser.add_argument("--keep", default="", metavar="FOLDER", help="keep the stores here")
    arguments = parser.parse_args()
    folder = Path(arguments.keep or tempfile.mkdtemp(prefix="moegrid-report-"))
    try:
        start = min(seconds("-c", "import numpy, pyarrow.parquet") for _ in range(3))
        print(f"importing NumPy and PyArrow: {start:.2f} s")
        url = str(folder / "report")
        graph = fill(Store.open(url), arguments.cells)
        took = seconds(
            "-m", "orchestrator", "report", GRID, *overrides(arguments.cells), "--store", url, "--tracking", "none"
        )
        size = (folder / "report" / "reports" / GRID / "index.html").stat().st_size
        cells = f"{len(graph.grid.cells)} cells ({len(graph.stages)} artifacts)"
        print(f"report of {cells}: {took:.1f} s, {size / 1e6:.1f} MB", flush=True)
        url = str(folder / "tracked")
        graph = fill(Store.open(url), arguments.tracked)
        tracker = f"sqlite:///{folder / 'mlflow.db'}"
        words = ("-m", "orchestrator", "sync", "--store", url, "--tracking", tracker)
        took, again = seconds(*words), seconds(*words)
        started = min(seconds("-c", "import mlflow, mlflow.tracking; mlflow.MlflowClient()") for _ in range(2))
        runs, points = counts(tracker)
        cells = f"{len(graph.grid.cells)} cells ({runs} runs, {points} points)"
        print(f"sync of {cells} into SQLite: {took:.0f} s; again, with nothing to add: {again:.1f} s")
        print(f"importing MLflow: {started:.1f} s")
        batched, alone = took / points, one_by_one(tracker)
        ratio = f"{alone / batched:.0f}x"
        print(f"a point: {batched * 1e3:.2f} ms in batches, {alone * 1e3:.2f} ms by a call of its own: {ratio}")
    finally:
        if not arguments.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
