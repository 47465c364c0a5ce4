"""Commands that read change nothing: no store is made, no version of a grid is written down, no file is touched."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.backends.base import Handle
from orchestrator.commands.context import Context
from orchestrator.engine.journal import Journal
from orchestrator.errors import EXIT_DONE, EXIT_UNREACHABLE, EXIT_USAGE, StoreError
from orchestrator.grid.load import load_grid
from orchestrator.plan.describe import describe_job
from orchestrator.plan.graph import build_graph
from orchestrator.plan.root import root_digest, root_document
from orchestrator.store import Store, records
from orchestrator.store.attempts import Submission

OVERRIDE = "set.finetune.lr=1e-3"
# Words and what they answer on a store that is there, and on none.
READING = [
    (["plan", "quickstart", OVERRIDE], 0, 0),
    (["plan", "quickstart", "--only", "freeze=router", "--json"], 0, 0),
    (["explain", "quickstart:freeze=none", OVERRIDE], 0, 0),
    (["explain", "quickstart", "--seeds", "0,1", "--json"], 0, 0),
    (["status", "quickstart", OVERRIDE], 0, 0),
    (["status", "quickstart", "--json"], 0, 0),
    (["table", "quickstart", OVERRIDE], 0, 0),
    (["compare", "quickstart", "quickstart"], 0, EXIT_USAGE),
    (["diff", "quickstart", "quickstart"], 0, 0),
    (["logs", "quickstart", "--rank", "0"], 0, EXIT_USAGE),
    (["export", "quickstart:freeze=none", "out"], EXIT_USAGE, EXIT_USAGE),
    (["gc"], 0, 0),
    (["gc", "--json"], 0, 0),
    (["cancel", "quickstart"], None, EXIT_UNREACHABLE),
    (["sync"], None, EXIT_UNREACHABLE),
    (["gc", "--delete"], None, EXIT_UNREACHABLE),
    (["report", "quickstart"], None, EXIT_UNREACHABLE),
    (["paper"], 0, 0),
    (["ui"], EXIT_USAGE, EXIT_USAGE),
    (["run", "no_such_grid"], EXIT_USAGE, EXIT_USAGE),
    (["run", "finetune_freeze", "--scale", "paper"], EXIT_USAGE, EXIT_USAGE),
    (["tick", "quickstart", "factors.freeze=[nnoe]"], EXIT_USAGE, EXIT_USAGE),
]


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEGRID_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MOEGRID_TRACKING", f"sqlite:///{tmp_path}/store/mlflow.db")
    monkeypatch.setenv("MOEGRID_RUN_DIR", str(tmp_path / "drivers"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "store"


@pytest.fixture
def begun(own_places: Path) -> Store:
    """A store in which a run of quickstart has begun: a version, a claim, a submission and a log."""
    store, graph = Store.open(str(own_places)), build_graph(load_grid("quickstart"))
    store.write_root("quickstart", root_digest(graph), root_document(graph))
    first = next(iter(graph.stages))
    job = describe_job(graph, "driver-0-0", [first], graph.resources(first), {})
    journal = Journal(store)
    journal.submit(Submission("driver-0", (job,), grid="quickstart", site="local"))
    journal.record_handles([Handle("driver-0-0", "driver-0", "1", {})])
    assert store.claims.claim(first, "driver-0-0", ttl=60.0)
    store.put_json("attempts/driver-0-0/heartbeat.json", {"time": 1.0, "step": 3, "total": 9, "stage": first})
    store.objects.put("attempts/driver-0-0/log/0.txt", b"a line\n")
    return store


def everything(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return what lies below `folder`, with the time of each change."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        found[str(path)] = (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
    return found


@pytest.mark.parametrize(("words", "code"), [(words, code) for words, code, _ in READING if code is not None])
def test_what_reads_changes_nothing(
    begun: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int
) -> None:
    before = everything(tmp_path)
    assert cli.main(words) == code, capsys.readouterr().err
    assert everything(tmp_path) == before


@pytest.mark.parametrize(("words", "code"), [(words, code) for words, _, code in READING])
def test_a_store_that_does_not_exist_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int
) -> None:
    assert cli.main(words) == code, capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    if code == EXIT_UNREACHABLE:
        assert f"error: there is no store at {tmp_path}/store\nhint: " in capsys.readouterr().err


def test_the_newest_version_of_a_grid_is_the_one_that_was_run(begun: Store) -> None:
    ran = records.document(begun, "quickstart")["digest"]
    for command in ("plan", "explain", "status", "table"):
        assert cli.main([command, "quickstart", OVERRIDE]) == EXIT_DONE
    assert records.document(begun, "quickstart")["digest"] == ran
    assert len(records.versions(begun, "quickstart")) == 1


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_long_list_is_written_item_by_item_as_if_at_once(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    context = Context.open(cli.parse(["status", "quickstart", "--json"]))
    drawn: list[int] = []

    def items() -> Iterator[object]:
        for number in range(count):
            assert len(drawn) == number
            yield {"id": number, "metrics": {"a": 0.5, "text": "two\nlines"}, "none": {}}
            drawn.append(number)

    capsys.readouterr()
    context.emit_listed({"grid": "g", "scale": "tiny"}, "cells", items())
    streamed = capsys.readouterr().out
    cells = [{"id": n, "metrics": {"a": 0.5, "text": "two\nlines"}, "none": {}} for n in range(count)]
    context.emit({"grid": "g", "scale": "tiny", "cells": cells})
    assert streamed == capsys.readouterr().out


def test_doctor_leaves_nothing_behind(begun: Store, own_places: Path, tmp_path: Path) -> None:
    def names() -> set[str]:
        return {path for path in everything(own_places) if "/.moegrid/" not in path}

    before = names()
    cli.main(["doctor", "--json"])
    assert names() == before
    cli.main(["doctor", "--json", "--store", str(tmp_path / "none" / "here")])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_an_opened_store_that_is_read_cannot_be_written(tmp_path: Path, kind: str) -> None:
    url = str(tmp_path / "other") if kind == "folder" else f"memory://{uuid.uuid4().hex}"
    store = Store.peek(url)
    assert not store.exists
    assert list(store.objects.list("")) == []
    for write in (
        lambda: store.put_json("a", {}),
        lambda: store.create_json("a", {}),
        lambda: store.objects.replace("a", b"", "x"),
        lambda: store.objects.upload("a", tmp_path),
        lambda: store.objects.delete("a"),
    ):
        with pytest.raises(StoreError, match="opened to be read"):
            write()
    assert list(tmp_path.iterdir()) == []
    Store.open(url).put_json("a", {"x": 1})
    assert Store.peek(url).exists
    assert Store.peek(url).get_json("a") == {"x": 1}
