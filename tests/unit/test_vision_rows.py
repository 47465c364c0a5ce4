"""Rows with pictures in files and on the hub: questions, answers, where pictures lie, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.data.images import digest_of, load_images
from jobs.data.item_files import item_blobs
from jobs.data.stage import corpora_rows, parquet, pictures, read_rows, split_rows
from orchestrator.data.local_data import head_findings
from orchestrator.errors import SourceError
from orchestrator.spec.cell import CorpusSpec, DataSpec
from tests.picture_samples import noise, picture

RED, BLUE = picture((255, 0, 0)), picture((0, 0, 255), form="JPEG")
NOISE = noise()
QUESTION = "What colour is it?"


def folder(path: Path, *rows: dict, pictures: dict[str, bytes] | None = None) -> DataSpec:
    for name, data in ({"red.png": RED, "deep/blue.jpg": BLUE} if pictures is None else pictures).items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSpec(f"file://{path}", format="vision", holdout=0.0, digest="ab")


def read(data: DataSpec) -> tuple[list, dict[str, bytes]]:
    images: dict[str, bytes] = {}
    return list(read_rows(data, images=images)), images


def test_a_folder_holds_rows_and_the_pictures_that_they_name(tmp_path):
    both = {"images": ["red.png", "deep/blue.jpg"], "prompt": "Same colour?", "answer": "no", "identity": "r+b"}
    rows, images = read(folder(tmp_path, {"image": "red.png", "prompt": QUESTION, "response": "red"}, both))
    assert images == {digest_of(RED): RED, digest_of(BLUE): BLUE}
    assert [(row.prompt, row.response, row.images) for row in rows] == [
        (QUESTION, " red", (digest_of(RED),)),
        ("Same colour?", " no", (digest_of(RED), digest_of(BLUE))),
    ]
    assert rows[1].identity == "r+b"
    assert not list(head_findings(folder(tmp_path, both)))


def test_layouts_of_public_sets_are_read(tmp_path):
    turns = [("human", f"<image>\n{QUESTION}"), ("gpt", "red"), ("human", "Sure?\n<image>"), ("gpt", "yes")]
    conversation = {"image": "red.png", "conversations": [{"from": who, "value": text} for who, text in turns]}
    chosen = {"image": "red.png", "prompt": "Which?", "choices": ["blue", "red"], "label": 1}
    text = {"image": None, "prompt": "No picture?", "response": "none"}
    rows, _ = read(folder(tmp_path, conversation, chosen, text))
    found = [(row.prompt, row.response, len(row.images)) for row in rows]
    assert found == [(QUESTION, " red", 1), ("Sure?", " yes", 1), ("Which?", " red", 1), ("No picture?", " none", 0)]


def test_encoded_pictures_in_a_column_are_read(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "picture": pa.array([{"bytes": RED, "path": "a.png"}, {"bytes": BLUE, "path": None}], kind),
        "prompt": pa.array([QUESTION, QUESTION]),
        "response": pa.array(["red", "blue"]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    data = DataSpec(f"file://{tmp_path}/a.parquet", format="vision", images_field="picture", holdout=0.0, digest="ab")
    assert not list(head_findings(data))
    rows, images = read(data)
    assert [images[row.images[0]] for row in rows] == [RED, BLUE]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image": "gone.png"}, "its picture 'gone.png' does not exist"),
        ({"image": "../secret.png"}, "lies outside of"),
        ({"image": "/etc/passwd"}, "lies outside of"),
        ({"image": "link.png"}, "lies outside of"),
        ({"image": "a\0b"}, "no path|does not exist"),
        ({"pictures": "red.png"}, "has no column 'images'"),
        ({"image": 7}, "its picture is int"),
        ({"image": "red.png", "response": None}, "not text"),
        ({"image": "red.png", "choices": ["a"], "label": 3}, "label 3 is none of its 1 choices"),
        ({"image": "red.png", "conversations": [{"from": "human", "value": "?"}]}, "no answer"),
        ({"image": "cut.png"}, "damaged or truncated"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(tmp_path, row, message):
    (tmp_path / "secret.png").write_bytes(RED)
    source = tmp_path / "set"
    source.mkdir()
    (source / "link.png").symlink_to(tmp_path / "secret.png")
    whole = {"prompt": "?", **({} if "label" in row or "conversations" in row else {"response": "x"}), **row}
    data = folder(source, whole, pictures={"red.png": RED, "cut.png": NOISE[:-900]})
    with pytest.raises(SourceError, match=rf"rows\.jsonl, row 1.*({message})"):
        read(data)
    planned = list(head_findings(data))
    assert bool(planned) != ("cut" in str(row)), "the plan says all but what only decoding shows"


def test_a_path_needs_a_folder_as_its_source(tmp_path):
    folder(tmp_path, {"image": "red.png", "prompt": "?", "response": "x"})
    data = DataSpec(f"file://{tmp_path}/rows.jsonl", format="vision", digest="ab")
    with pytest.raises(SourceError, match="is a file") as caught:
        read(data)
    assert "make the folder" in caught.value.hint
    assert list(head_findings(data))


def test_what_is_held_out_is_shown_in_no_training_row(tmp_path):
    rows = [{"image": "red.png", "prompt": f"{n}?", "answer": "x", "identity": f"{n % 10}+{n % 7}"} for n in range(70)]
    data = folder(tmp_path, *rows)
    train, heldout = split_rows(read_rows(data), DataSpec("x", format="vision", holdout=0.2), seed=3)
    apart = {row.identity.split("+")[0] for row in heldout}
    assert len(apart) == 2
    assert train
    assert not apart & {one for row in train for one in row.identity.split("+")}
    assert {row.id for row in heldout} == {row.id for row in read_rows(data) if row.identity.split("+")[0] in apart}


def test_corpora_of_pictures_are_mixed_and_keep_the_pictures_of_rows_alone(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    folder(one, *({"image": "red.png", "prompt": f"{n}?", "answer": "red"} for n in range(20)))
    folder(other, *({"image": "deep/blue.jpg", "prompt": f"{n}?", "answer": "blue"} for n in range(20)))
    parts = tuple(CorpusSpec(path.name, f"file://{path}", rows=5, digest="ab") for path in (one, other))
    images: dict[str, bytes] = {}
    train, heldout = corpora_rows(DataSpec("", format="vision", holdout=0.0, corpora=parts), 0, images)
    assert {name: len(rows) for name, rows in train.items()} == {"one": 5, "other": 5}
    (tmp_path / "images.parquet").write_bytes(pictures(images, train["one"], heldout)["images.parquet"])
    assert load_images(tmp_path / "images.parquet") == {digest_of(RED): RED}
    table = pq.read_table(pa.BufferReader(parquet(train["one"])))
    assert table.column_names == ["id", "source", "prompt", "response", "images", "group", "identity", "subtask"]
    assert table["images"].to_pylist() == [[digest_of(RED)]] * 5


def test_what_one_corpus_holds_out_no_other_shows_in_training(tmp_path):
    """Each holds out a share of the things that it shows, and they do not show the same things."""
    parts = []
    for name, things in (("one", range(20)), ("other", range(10, 40))):
        rows = ({"image": "red.png", "prompt": f"{name} {n}?", "answer": "red", "identity": f"t{n}"} for n in things)
        (tmp_path / name).mkdir()
        parts.append(CorpusSpec(name, folder(tmp_path / name, *rows).source, digest="ab"))
    for seed in range(8):
        train, heldout = corpora_rows(DataSpec("", format="vision", holdout=0.25, corpora=tuple(parts)), seed)
        trained = {row.identity for rows in train.values() for row in rows}
        assert heldout
        assert not trained & {row.identity for row in heldout}


def test_items_name_their_pictures_by_digest(tmp_path):
    (tmp_path / "shapes").mkdir()
    item = {"images": ["red.png"], "prompt": "?", "choices": ["a", "b"], "label": 0}
    (tmp_path / "shapes" / "test.jsonl").write_text(json.dumps(item) + "\n")
    (tmp_path / "red.png").write_bytes(RED)
    blobs, counts = item_blobs(DataSpec(f"file://{tmp_path}", format="items"), ["shapes"])
    assert counts == {"shapes": {"test": 1}}
    assert json.loads(blobs["shapes/test.jsonl"])["images"] == [digest_of(RED)]
    (tmp_path / "images.parquet").write_bytes(blobs["images.parquet"])
    assert load_images(tmp_path / "images.parquet") == {digest_of(RED): RED}
    (tmp_path / "red.png").write_bytes(NOISE[:-900])
    with pytest.raises(SourceError, match=r"shapes/test\.jsonl, row 1: its picture is damaged"):
        item_blobs(DataSpec(f"file://{tmp_path}", format="items"), ["shapes"])
