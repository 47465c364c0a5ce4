"""Weighted mixtures of corpora: shares that hold at any length, one preparation for all weights, exact forks."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.data.packing import TextBatches, _Turns, open_batches
from jobs.node.preemption import Preempted
from orchestrator.catalog.parameters import Parameters
from orchestrator.errors import GridError
from orchestrator.grid.load import Grid, load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.spec.cell import TrainSpec
from orchestrator.spec.work import DataWork, TokensWork, TrainWork
from orchestrator.store import Store
from tests.integration.stages import run_stages
from tests.training import TRAIN, _npy, put, run_chain, segments, state_bits
from tests.unit.test_train_exactness import fresh, stop_after


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("shares", [(1.0,), (0.7, 0.3), (0.5, 0.25, 0.25), (1 / 3, 2 / 3), (0.0001, 0.9999)])
def test_every_stretch_has_its_shares(shares: tuple[float, ...]) -> None:
    turns = _Turns(shares)
    found = [turns.at(position) for position in range(25_000)]
    for corpus, share in enumerate(shares):
        so_far = np.cumsum([owner == corpus for owner, _ in found])
        assert abs(so_far - share * np.arange(1, 25_001)).max() <= 1.5, "within about a window at any length"
        own = [nth for owner, nth in found if owner == corpus]
        assert own == list(range(len(own))), "each corpus is read in its own order, without a gap"


def corpora_folder(folder: Path) -> Path:
    """Two corpora of different words, so that a window says where it comes from."""
    folder.mkdir(exist_ok=True)
    for name, word, count in (("web", "salt", 30), ("code", "stone", 12)):
        rows = [json.dumps({"text": f"{word} {word} number {i} " + f"{word} " * 40}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


GRID = """name: g
base: pretrain
evaluate: [lm]
at: [1.0]
FACTORS
set:
  pretrain.steps: 4
  pretrain.data.holdout: 0.2
  pretrain.data.corpora:
    web: {source: "file://web.jsonl"}
    code: {source: "file://code.jsonl", rows: 8}
"""


def load(folder: Path, factors: str = "factors: {weights.web: [1, 3], seed: [0]}", more: str = "") -> Grid:
    path = corpora_folder(folder) / "g.yaml"
    path.write_text(GRID.replace("FACTORS", factors) + more)
    return load_grid(str(path))


def trains(grid: Grid) -> list[TrainSpec]:
    return [cell.cell.pretrain for cell in grid.cells if cell.cell.pretrain is not None]


def test_weights_are_a_factor_and_the_data_are_prepared_once(tmp_path: Path) -> None:
    grid = load(tmp_path)
    assert [dict(train.data.weights) for train in trains(grid)] == [
        {"code": 0.5, "web": 0.5},
        {"code": 0.25, "web": 0.75},
    ]
    stages = Counter(stage.kind for stage in build_graph(grid).stages.values())
    assert (stages["data"], stages["tokens"], stages["train"]) == (1, 1, 2)
    again = load(tmp_path, "factors: {weights.web: [0.3], weights.code: [0.1], seed: [0]}")
    assert [cell.id for cell in again.cells] == [grid.cells[1].id], "equal proportions are one mixture"


def test_a_corpus_of_weight_nothing_is_not_there(tmp_path: Path) -> None:
    (train,) = trains(load(tmp_path, "factors: {weights.code: [0], seed: [0]}"))
    assert [corpus.name for corpus in train.data.corpora] == ["web"]


def test_rows_of_each_corpus_are_split_tokenized_and_drawn_by_weight(tmp_path: Path) -> None:
    grid = load(tmp_path, "factors: {weights.web: [3], seed: [0]}", "  tokenizer.vocab_size: 300\n")
    stages = [stage.work for stage in build_graph(grid).stages.values()]
    prepared = [work for kind in ("data", "tokenizer", "tokens") for work in stages if work.kind == kind]
    store = Store.open(str(tmp_path / "store"))
    data, _, tokens = run_stages(store, prepared)
    assert data.info["corpora"] == {"code": 6, "web": 24}
    assert data.info["rows"]["heldout"] <= 8
    assert isinstance(prepared[0], DataWork)
    assert not prepared[0].data.weights
    assert isinstance(prepared[-1], TokensWork)
    ranges = tokens.info["corpora"]
    assert ranges["code"][0] == 0
    assert ranges["code"][1] == ranges["web"][0]
    assert ranges["web"][1] == tokens.info["tokens"]["train"]
    folder = tmp_path / "arrays"
    folder.mkdir()
    for blob in tokens.blobs:
        store.artifacts.fetch(tokens, blob.name, folder)
    whole = np.load(folder / "train_tokens.npy").astype(np.int64)
    own = {name: set(whole[a:b].tolist()) for name, (a, b) in ranges.items()}
    corpora = [(*ranges["code"], 0.25), (*ranges["web"], 0.75)]
    batches = open_batches("text", folder, 32, 0, corpora=corpora)
    rows = [row.tolist() for step in range(10) for row in batches.micro_batch(step, 0, 4).input_ids]
    of_code = [set(row) <= own["code"] for row in rows]
    assert sum(of_code) == 10, "one window in four"
    assert all(set(row) <= own["web"] for row, code in zip(rows, of_code, strict=True) if not code)
    assert isinstance(batches, TextBatches)
    with pytest.raises(Exception, match="too few for sequences of 5000"):
        open_batches("text", folder, 5000, 0, corpora=corpora)


def mixed_tokens(store: Store) -> None:
    """Commit a tokens artifact of two corpora of instructions, told apart by their tokens."""
    lengths = [12] * 30
    tokens = np.concatenate([np.full(n, 5 if i < 20 else 9) for i, n in enumerate(lengths)]).astype(np.uint16)
    tokens[::3] += 1
    edges = np.array([0, *accumulate(lengths)])
    arrays = {"tokens": tokens, "offsets": edges, "loss_mask": np.arange(len(tokens)) % 12 >= 6}
    arrays |= {"spans_word": np.ones(len(tokens), bool), "spans_sentence": np.ones(len(tokens), bool)}
    info = {"pad": 0, "corpora": {"a": [0, 20], "b": [20, 30]}}
    put(store, "mixed", "tokens", {f"train_{name}.npy": _npy(array) for name, array in arrays.items()}, info)


def test_a_mixture_of_examples_resumes_with_equal_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataclasses.replace(TRAIN.data, format="instruction", weights=Parameters({"a": 0.25, "b": 0.75}))
    train = dataclasses.replace(TRAIN, steps=8, data=data, loss="response")
    works = segments([("", 0, 4), ("router", 4, 8)], train, tokens="mixed")
    straight, cut = fresh(tmp_path, "straight"), fresh(tmp_path, "cut")
    for store in (straight, cut):
        mixed_tokens(store)
    run_chain(straight, works)
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(Preempted):
            run_chain(cut, works)
    run_chain(cut, works[1:], "b")
    assert state_bits(cut, works[1].key()) == state_bits(straight, works[1].key())

    def other(weights: dict[str, float]) -> TrainWork:
        changed = dataclasses.replace(data, weights=Parameters(weights))
        return segments([("", 0, 4)], dataclasses.replace(train, data=changed), tokens="mixed")[0]

    assert other({"a": 0.25, "b": 0.75}).key() == works[0].key()
    assert other({"a": 0.5, "b": 0.5}).key() != works[0].key()


@pytest.mark.parametrize(
    ("factors", "more", "said"),
    [
        ("factors: {weights.wep: [1]}", "", "weight of 'wep', which is no corpus.*did you mean 'web'"),
        ("factors: {weights.web: [-1]}", "", "weight of corpus 'web' must be a number of at least 0, not -1"),
        ("factors: {weights.web: [0], weights.code: [0]}", "", "every corpus has the weight 0"),
        ("factors: {weights.web: [1.0e-9]}", "", "corpus 'web' has a share of 1e-09.*at least 0.0001"),
        ("factors: {data: [a, b]}", "", "the corpora say where the data come from"),
        ("factors: {seed: [0]}", "  pretrain.data.corpora.books: {rows: 3}\n", "corpus 'books' has no source"),
        ("factors: {seed: [0]}", '  pretrain.data.corpora.books: {source: "file://no.jsonl"}\n', "does not exist"),
        ("factors: {seed: [0]}", "  pretrain.data.corpora.web.text_field: body\n", "has no column 'body'"),
        ("factors: {pretrain.data.corpora: [[web]]}", "", "their weights vary"),
    ],
)
def test_a_wrong_mixture_is_told_before_anything_runs(tmp_path: Path, factors: str, more: str, said: str) -> None:
    with pytest.raises(GridError) as caught:
        load(tmp_path, factors, more)
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)


def test_weights_without_corpora_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text("name: g\nbase: pretrain\nevaluate: [lm]\nfactors: {weights.web: [1]}\n")
    with pytest.raises(GridError, match="weight of 'web', which is no corpus"):
        load_grid(str(path))
