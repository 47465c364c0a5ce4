"""Chat data: four layouts become turns, a template makes text of them, and every answer carries the loss."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.data.corpora import Conversation
from jobs.data.stage import parquet
from jobs.data.tokenizer import Vocabulary, train_bpe
from jobs.data.tokens import chat_arrays
from orchestrator.catalog.templates import TEMPLATES, ChatTemplate
from orchestrator.data.layouts import conversation, turns_of
from orchestrator.errors import GridError, MoegridError, SourceError
from orchestrator.grid.load import Grid, load_grid
from orchestrator.plan.graph import build_graph
from orchestrator.spec.cell import DataSpec
from orchestrator.spec.work import DataWork
from orchestrator.store import Store
from tests.integration.stages import run_stages

CHAT = DataSpec("file:///chat.jsonl", format="chat")
TWO = [("user", "hi"), ("assistant", "hello")]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}, TWO),
        ({"conversations": ["hi", "hello"], "source": "lima"}, TWO),
        ({"conversations": ["hi", "hello", "and", "so"]}, [*TWO, ("user", "and"), ("assistant", "so")]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}, TWO),
        ({"instruction": "hi", "input": "", "output": "hello"}, TWO),
        ({"instruction": "add", "input": "1, 2", "output": "3"}, [("user", "add\n1, 2"), ("assistant", "3")]),
        ({"prompt": "hi", "response": "hello"}, TWO),
    ],
)
def test_a_row_of_each_layout_is_its_turns(row: dict[str, Any], turns: list[tuple[str, str]]) -> None:
    assert turns_of(row, CHAT, "here") == turns


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "no answer"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "turn 1 has the role 'tool'"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "turn 1 has no text"),
        ({"messages": "hi"}, "no conversation .*'messages' is str"),
        ({"text": "hi"}, "no conversation .*its columns are text"),
    ],
)
def test_a_row_that_is_none_is_told(row: dict[str, Any], said: str) -> None:
    with pytest.raises(SourceError) as caught:
        conversation(row, CHAT, "file.jsonl, row 3")
    assert re.search(said, f"{caught.value.error} {caught.value.cause}")
    assert "file.jsonl, row 3" in caught.value.error


def test_templates_put_loss_on_answers_alone() -> None:
    turns = [("system", "Be brief."), *TWO, ("user", "bye"), ("assistant", "so long"), ("user", "left out")]
    assert TEMPLATES.get("plain").pieces(turns) == (
        "Be brief.\n\nUser: hi\nAssistant:",
        " hello\n",
        "User: bye\nAssistant:",
        " so long\n",
    )
    assert TEMPLATES.get("chatml").pieces(TWO) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "hello<|im_end|>\n",
    )
    bare = ChatTemplate("bare", user="U {content} ", assistant="A{content}.", begin="# ")
    assert bare.pieces(turns[:3]) == ("# U Be brief.\n\nhi A", "hello.")
    with pytest.raises(MoegridError, match="does not say once where the assistant's"):
        ChatTemplate("wrong", user="{content}", assistant="no")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_bpe(iter(["User: hi there, how are you? Assistant: hello, I am well."] * 5), 300)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    (folder / "special.json").write_text(json.dumps({"bos": "<|bos|>", "eos": "<|eos|>", "pad": "<|pad|>"}))
    return Vocabulary.load(folder)


def arrays(
    folder: Path, vocabulary: Vocabulary, pieces: list[str], max_length: int = 0
) -> tuple[list[int], list[bool]]:
    (folder / "train.parquet").write_bytes(parquet([Conversation("c", "s", tuple(pieces))]))
    found = chat_arrays(folder / "train.parquet", vocabulary, max_length)
    assert found["offsets"].tolist() == [0, len(found["tokens"])]
    return found["tokens"].tolist(), found["loss_mask"].tolist()


@pytest.mark.parametrize("joins", [False, True])
def test_what_carries_the_loss_are_the_answers_and_the_end(tmp_path: Path, vocabulary: Vocabulary, joins: bool) -> None:
    vocabulary = Vocabulary(vocabulary.tokenizer, vocabulary.bos, vocabulary.eos, vocabulary.pad, False, joins)
    pieces = list(TEMPLATES.get("plain").pieces([*TWO, ("user", "how are you?"), ("assistant", "well")]))
    tokens, mask = arrays(tmp_path, vocabulary, pieces)
    decode = vocabulary.tokenizer.decode
    assert decode(tokens[:-1]) == "".join(pieces)
    assert (tokens[-1], mask[-1]) == (vocabulary.eos, True)
    assert decode([t for t, counted in zip(tokens[:-1], mask[:-1], strict=True) if counted]) == " hello\n well\n"


def test_a_long_conversation_loses_its_beginning_and_keeps_its_last_answer(
    tmp_path: Path, vocabulary: Vocabulary
) -> None:
    pieces = ["User: hi\nAssistant:", " hello\n", "User: how are you? " * 4 + "Assistant:", " I am well, " * 6]
    tokens, mask = arrays(tmp_path, vocabulary, pieces)
    cut, kept = arrays(tmp_path, vocabulary, pieces, len(tokens) - 8)
    assert (cut, kept) == (tokens[8:], mask[8:])
    short, counted = arrays(tmp_path, vocabulary, pieces, 10)
    last = len(mask) - mask[::-1].index(False)
    assert (short, counted) == (tokens[last - 1 : last + 9], [False] + [True] * 9)


GRID = """name: g
base: finetune
evaluate: [lm]
at: [1.0]
FACTORS
set:
  model: {hidden_size: 32, num_layers: 2, num_heads: 2, num_kv_heads: 2, active_width: 32, moe: {num_experts: 4}}
  tokenizer.vocab_size: 300
  pretrain: {steps: 2, micro_batch: 2, sequence_length: 16, data: {source: "file://text.jsonl"}}
  finetune: {steps: 4, micro_batch: 2}
  finetune.data: {source: "file://chat.jsonl", format: chat, template: chatml, holdout: 0.3}
"""


def load(folder: Path, factors: str = "factors: {seed: [0]}", more: str = "") -> Grid:
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"text {i} " * 30}) + "\n" for i in range(20)))
    rows = [
        {"messages": [{"role": r, "content": f"{r} says {i}"} for r in ("user", "assistant") * 2]} for i in range(9)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "g.yaml").write_text(GRID.replace("FACTORS", factors) + more)
    return load_grid(str(folder / "g.yaml"))


def test_templates_are_a_factor_of_the_data(tmp_path: Path) -> None:
    graph = build_graph(load(tmp_path, "factors: {template: [plain, chatml], freeze: [none, none->router]}"))
    data = [stage.work for stage in graph.stages.values() if isinstance(stage.work, DataWork)]
    assert [work.data.template for work in data if work.data.format == "chat"] == ["plain", "chatml"]
    tuned = [stage for stage in graph.stages.values() if stage.phase == "finetune"]
    assert len(tuned) == 6, "each template: one first half, two second ones"


def test_chat_is_trained_and_its_answers_are_scored(tmp_path: Path) -> None:
    graph = build_graph(load(tmp_path))
    store = Store.open(str(tmp_path / "store"))
    works = [stage.work for stage in graph.stages.values()]
    made = [work for work in works if work.kind != "evaluate"]
    manifests = run_stages(store, made)
    # A job of its own: a training's last state is committed in the background, at the latest when its job ends.
    (measured,) = run_stages(store, [work for work in works if work.kind == "evaluate"])
    # Held-out are 3 conversations of two answers; the suite reads the pretraining text where there is one.
    assert np.isfinite(measured.metrics["val_loss"])
    tokens = [m for m, work in zip(manifests, made, strict=True) if work.kind == "tokens"]
    assert all(m.info["tokens"]["train"] > 0 for m in tokens)


def test_held_out_answers_are_all_scored(tmp_path: Path, vocabulary: Vocabulary) -> None:
    from jobs.evaluate.suites.language_model import heldout

    pieces = ["User: hi\nAssistant:", " hello\n", "User: how?\nAssistant:", " well\n"]
    (tmp_path / "heldout.parquet").write_bytes(parquet([Conversation("c", "s", tuple(pieces))]))
    found = chat_arrays(tmp_path / "heldout.parquet", vocabulary)
    for name, array in found.items():
        np.save(tmp_path / f"heldout_{name}.npy", array)

    class Context:
        def manifest(self, key: str) -> Any:
            return type("M", (), {"blobs": []})

        def fetch(self, key: str, name: str) -> Path:
            return tmp_path / name

    class Decoder:
        def decode(self, ids: Any) -> str:
            return str(vocabulary.tokenizer.decode(list(ids)))

    work: Any = type("W", (), {"tokens": "t", "val_tokens": 0, "max_length": 512})
    context: Any = Context()
    (text,) = heldout(context, work, Decoder())
    assert [vocabulary.tokenizer.decode(list(predicted)) for _, predicted in text.pieces] == [" hello\n", " well\n"]
    assert text.size == len(" hello\n well\n")
    whole = found["tokens"].tolist()
    assert [list(fed) == whole[: len(fed)] for fed, _ in text.pieces] == [True, True]


@pytest.mark.parametrize(
    ("factors", "more", "said"),
    [
        ("factors: {template: [chatlm]}", "", "must be one of 'plain', .*not 'chatlm'.*did you mean 'chatml'"),
        ("factors: {seed: [0]}", "  finetune.data.turns_field: turns\n", "no conversation .*its columns are messages"),
        ("factors: {pretrain.data.template: [plain, tulu]}", "", "data.format is not 'chat'"),
        ("factors: {seed: [0]}", "  finetune.data.format: chats\n", "must be one of 'text', 'instruction', 'chat'"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(tmp_path: Path, factors: str, more: str, said: str) -> None:
    with pytest.raises(GridError) as caught:
        load(tmp_path, factors, more)
    assert re.search(said, str(caught.value), re.DOTALL), str(caught.value)
