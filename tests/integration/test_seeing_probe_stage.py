"""The suite `seeing_probe` as a stage, on what a data source held out."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.grid.columns import of_seeing_probe
from orchestrator.spec.cell import DataSpec, EvaluateSpec, TokenizerSpec
from orchestrator.spec.resolve import before_upcycling, text_part
from orchestrator.spec.work import DataWork, EvaluateWork, InitWork, TokenizerWork, TokensWork
from orchestrator.store import Store
from tests.integration.stages import run_stages
from tests.picture_samples import picture
from tests.seeing import SEES, VISION

MODEL = dataclasses.replace(SEES, context=128)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with some text, and questions of two subtasks about pictures."""
    (tmp_path / "shown").mkdir()
    rows = []
    for number in range(40):
        (tmp_path / "shown" / f"{number}.png").write_bytes(picture((200 - number, 0, 5 * number), (8, 8)))
        asked = {"prompt": f"What colour is number {number % 7}?", "answer": ("red", "blue")[number % 2]}
        rows.append({"image": f"{number}.png", **asked, "subtask": ("near", "far")[number % 3 == 0]})
    (tmp_path / "shown" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = [json.dumps({"text": f"{n} red blue {n * n}"}) for n in range(200)]
    (tmp_path / "text.jsonl").write_text("\n".join(text))
    return tmp_path


def test_it_measures_what_sees_in_a_state(folder: Path) -> None:
    store = Store.open(str(folder / "store"))
    text = DataWork(DataSpec(f"file://{folder}/text.jsonl", digest="ab"), 0)
    data = DataWork(DataSpec(f"file://{folder}/shown", format="vision", holdout=0.5, digest="cd"), 0)
    tokenizer = TokenizerWork(TokenizerSpec(vocab_size=300), text.key())
    tokens = TokensWork(data.key(), tokenizer.key(), "vision", 64, VISION.image_size)
    dense = before_upcycling(MODEL)
    first = InitWork(text_part(MODEL), tokenizer.key(), 0)
    seeing = InitWork(dense, tokenizer.key(), 0, "", first.key())
    experts = InitWork(MODEL, tokenizer.key(), 0, "", seeing.key())

    def asked(model: Any, state: str) -> EvaluateWork:
        return EvaluateWork("seeing_probe", state, model, tokenizer.key(), "", tokens.key(), max_length=64)

    works: list[Any] = [text, data, tokenizer, tokens, first, seeing, experts]
    *made, sparse = run_stages(store, [*works, asked(MODEL, experts.key())])
    assert sum(made[1].info["subtasks"].values()) == made[1].info["rows"]["train"] == 20
    assert set(made[1].info["subtasks"]) == {"near", "far"}
    assert set(sparse.metrics) == set(of_seeing_probe(EvaluateSpec()))
    assert sparse.metrics["encoder/expert_weight_similarity"] == pytest.approx(1.0), "copies of one feed-forward"
    told = sparse.info["subtasks"]
    assert sum(one["questions"] for one in told.values()) == 20
    assert set(told) == {"near", "far"}
    (blob,) = sparse.blobs
    with np.load(io.BytesIO(store.artifacts.read(blob))) as arrays:
        patches, pooled = VISION.patches + 1, VISION.tokens
        assert arrays["encoder.heldout.counts"].sum(1).tolist() == [3 * 20 * patches] * VISION.num_layers
        assert arrays["connector.heldout.counts"].sum() == 3 * 20 * pooled
        assert (arrays["encoder.near.counts"] + arrays["encoder.far.counts"] == arrays["encoder.heldout.counts"]).all()
        assert arrays["encoder.sample"].shape[::2] == (VISION.num_layers, 3)
