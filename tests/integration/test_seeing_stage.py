"""The suite `seeing` as a stage: a run that is killed in its middle goes on with what it has scored."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.evaluate.picture_scores import PictureScorer
from jobs.evaluate.suites.seeing import PICTURES_A_PART
from jobs.node.preemption import Signals
from jobs.run import run_job
from orchestrator.spec.cell import DataSpec, TaskSpec, TokenizerSpec
from orchestrator.spec.resolve import before_upcycling, text_part
from orchestrator.spec.work import DataWork, EvaluateWork, InitWork, TokenizerWork
from orchestrator.store import Manifest, Store
from tests.integration.stages import run_stages, submit
from tests.picture_samples import picture
from tests.seeing import SEES

PICTURES = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with some text, and two questions about each of forty pictures."""
    (tmp_path / "items" / "colour").mkdir(parents=True)
    items = []
    for number in range(PICTURES):
        (tmp_path / "items" / f"{number}.png").write_bytes(picture((200 - number, 0, 5 * number), (8, 8)))
        for question in ("What colour is it?", "Which colour?"):
            item = {"id": f"{number} {question}", "images": [f"{number}.png"], "prompt": question}
            items.append({**item, "identity": str(number), "choices": ["red", "blue"], "label": number % 2})
    (tmp_path / "items" / "colour" / "test.jsonl").write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"{n} red blue {n * n}"}) for n in range(200)))
    return tmp_path


def works(folder: Path) -> tuple[list[Any], EvaluateWork]:
    text = DataWork(DataSpec(f"file://{folder}/text.jsonl", digest="ab"), 0)
    tokenizer = TokenizerWork(TokenizerSpec(vocab_size=300), text.key())
    items = DataWork(DataSpec(f"file://{folder}/items", format="items", digest="cd", holdout=0.0), 0, ("colour",))
    first = InitWork(text_part(SEES), tokenizer.key(), 0)
    seeing = InitWork(before_upcycling(SEES), tokenizer.key(), 0, "", first.key())
    asked = EvaluateWork(
        "seeing", seeing.key(), before_upcycling(SEES), tokenizer.key(), items.key(), "",
        tasks=(TaskSpec("colour", 0),), max_length=24, benchmark="shown",
    )  # fmt: skip
    return [text, tokenizer, items, first, seeing], asked


def rows(store: Store, made: Manifest) -> list[dict[str, Any]]:
    (blob,) = made.blobs
    table: list[dict[str, Any]] = pq.read_table(io.BytesIO(store.artifacts.read(blob))).to_pylist()
    return table


def test_what_was_scored_before_a_kill_is_not_scored_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = Store.open(str(folder / "calm"))
    before, asked = works(folder)
    *_, undisturbed = run_stages(calm, [*before, asked])
    assert undisturbed.info["chunks_reused"] == 0

    store = Store.open(str(folder / "store"))
    run_stages(store, before)
    plain, read = PictureScorer.scores, list[int]()

    def counted(self: PictureScorer, *given: Any) -> list[list[float]]:
        read.append(1)
        if len(read) == PICTURES_A_PART + 5:
            raise MemoryError("killed")
        return plain(self, *given)

    monkeypatch.setattr(PictureScorer, "scores", counted)
    batch, _ = submit(store, [asked])
    assert run_job(store.url, batch, 0, Signals()) != 0
    assert len(list(store.objects.list(f"partial/{asked.key()}/"))) == 1
    stopped = len(read)
    (resumed,) = run_stages(store, [asked])
    assert resumed.info["chunks_reused"] == 1
    assert len(read) - stopped == PICTURES - PICTURES_A_PART
    assert resumed.metrics == undisturbed.metrics
    assert rows(store, resumed) == rows(calm, undisturbed)
    assert not list(store.objects.list(f"partial/{asked.key()}/"))
