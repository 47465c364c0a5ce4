"""Documents that a power cut emptied or a disk damaged: commands answer all the same, and gc collects nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.node.opening import planned_job
from orchestrator import cli
from orchestrator.backends.base import ENDED, Handle, JobState
from orchestrator.commands.context import Context
from orchestrator.engine.journal import Journal
from orchestrator.engine.loop import Engine, Options
from orchestrator.errors import EXIT_UNREACHABLE, LeaseLost, StoreError
from orchestrator.grid.load import load_grid
from orchestrator.plan.describe import describe_job
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.plan.root import root_digest, root_document
from orchestrator.store import Manifest, Store, records
from orchestrator.store.attempts import Failure, Heartbeat, Submission
from orchestrator.store.documents import parse, seal, sound
from orchestrator.store.retention import collect, grid_roots, plan_gc
from tests.processes import ROOT
from tests.unit.test_engine_loop import Scheduler

ATTEMPT = "driver-0-0"
DAMAGE = (b"", b"<html>busy</html>", b"\xff\x00\xfe", b"[]", b"{}", b"null", b'"text"', b"12", b'{"jobs": [7]}')
KINDS = ("submissions", "failures", "claims", "handle", "heartbeat", "report", "series", "tracking")


@pytest.fixture(scope="module")
def graph() -> StageGraph:
    return build_graph(load_grid("quickstart"))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graph: StageGraph) -> Store:
    """A store in which a run of quickstart has begun, and one of its stages has failed."""
    monkeypatch.setenv("MOEGRID_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MOEGRID_TRACKING", "none")
    monkeypatch.setenv("MOEGRID_RUN_DIR", str(tmp_path / "run"))
    made = Store.open(str(tmp_path / "store"))
    made.write_root("quickstart", root_digest(graph), root_document(graph))
    first, second = list(graph.stages)[:2]
    job = describe_job(graph, ATTEMPT, [first, second], graph.resources(first), {})
    journal = Journal(made)
    journal.submit(Submission("driver-0", (job,), grid="quickstart", site="local"))
    journal.record_handles([Handle(ATTEMPT, "driver-0", "1", {})])
    assert made.claims.claim(first, ATTEMPT, ttl=600.0)
    journal.record_failure(Failure(second, ATTEMPT, "nan", "the loss is not finite"), "a line of the log")
    made.put_json(f"attempts/{ATTEMPT}/heartbeat.json", {"time": 1.0, "step": 3, "total": 9, "stage": first})
    made.create_json(f"attempts/{ATTEMPT}/series/000000.json", {"stage": first, "rows": [{"step": 1, "loss": 2.0}]})
    made.objects.put(f"attempts/{ATTEMPT}/log/0.txt", b"a line\n")
    return made


def path_of(kind: str, graph: StageGraph) -> str:
    first, second = list(graph.stages)[:2]
    return {
        "submissions": "submissions/driver-0.json",
        "failures": f"failures/{second}/{ATTEMPT}.json",
        "claims": f"claims/{first}.json",
        "handle": f"attempts/{ATTEMPT}/handle.json",
        "heartbeat": f"attempts/{ATTEMPT}/heartbeat.json",
        "report": f"attempts/{ATTEMPT}/failure.json",
        "series": f"attempts/{ATTEMPT}/series/000000.json",
        "tracking": "tracking/none/quickstart.json",
        "roots": f"grids/quickstart/{root_digest(graph)}.json",
    }[kind]


def stages_of(store: Store, batch: str) -> list[str]:
    """Return the stages that a batch was asked to run."""
    submission = store.get_json(f"submissions/{batch}.json")
    assert submission is not None
    return [stage["key"] for job in submission["jobs"] for stage in job["stages"]]


def flipped(data: bytes) -> bytes:
    """Return `data` with one letter of a text in its middle changed, which is still JSON."""
    at = next(i for i in range(len(data) // 2, len(data)) if chr(data[i]).isalpha() and chr(data[i + 1]).isalpha())
    return data[:at] + (b"x" if data[at : at + 1] != b"x" else b"y") + data[at + 1 :]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_counts_as_absent_for_those_who_read(store: Store, graph: StageGraph, kind: str) -> None:
    for damage in DAMAGE:
        read_damaged(store, graph, kind, damage)


def read_damaged(store: Store, graph: StageGraph, kind: str, damage: bytes) -> None:
    """Read everything that engine, tracking and reports read, with one document damaged."""
    store.objects.put(path_of(kind, graph), damage)
    journal = Journal(store)
    stages = frozenset(graph.stages)
    assert journal.failures(stages).keys() == {list(graph.stages)[1]}, "the node's own record or the driver's is left"
    claims = journal.claims(stages)
    assert all(isinstance(claim.attempt, str) for claim in claims.values())
    journal.evict(next(iter(graph.stages)), ATTEMPT)
    assert journal.job(ATTEMPT) is None or kind != "submissions"
    assert journal.handle(ATTEMPT) is None or kind != "handle"
    beat = journal.heartbeat(ATTEMPT)
    assert beat in (None, Heartbeat() if kind == "heartbeat" else Heartbeat(1.0, next(iter(graph.stages)), 3, 9))
    assert isinstance(journal.site(ATTEMPT), str)
    attempts = records.Submissions(store, "quickstart").attempts()
    assert len(attempts) == (kind != "submissions")
    series = records.LiveSeries(store)
    assert series.refresh(attempts, {}) == (kind not in ("series", "submissions"))
    assert records.document(store, "quickstart")["digest"] == root_digest(graph)
    assert all(isinstance(one.message, str) for one in records.failures(store, stages).values())


def test_a_submission_is_read_as_it_was_written_and_a_node_says_what_is_damaged(
    store: Store, graph: StageGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Journal(store).submission("driver-0")
    assert written is not None
    use = {"provider": "mine.py", "version": "ab", "file": True, "names": {"routers": ["noisy"]}}
    (plain,) = written.jobs
    job = replace(plain, plugins=(use,), resources={**plain.resources, "nodes": 3, "processes": 2})
    whole = replace(written, jobs=(job,), plugin_files={"ab": {"name": "mine.py"}})
    path = path_of("submissions", graph)
    store.objects.put(path, seal(whole.to_json()))
    assert Journal(store).submission("driver-0") == whole
    assert planned_job(store, "driver-0", 0) == (job, [{"name": "mine.py"}])
    assert job.ranks == 6
    monkeypatch.setattr("jobs.node.opening.START_PATIENCE_SECONDS", 0.0)
    for damage in DAMAGE:
        store.objects.put(path, damage)
        with pytest.raises(StoreError, match=rf"{path} in .*|no submission {path}"):
            planned_job(store, "driver-0", 0)


def test_commands_answer_while_every_document_is_damaged(
    store: Store, graph: StageGraph, capsys: pytest.CaptureFixture[str]
) -> None:
    for damage in (b"", b"[]"):
        for kind in (*KINDS, "roots"):
            store.objects.put(path_of(kind, graph), damage)
        for words in (["status"], ["table"], ["explain"]):
            assert cli.main([words[0], "quickstart", *words[1:]]) == 0, capsys.readouterr().err
        assert cli.main(["logs", "quickstart"]) == 2
        assert "there is no attempt" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [*DAMAGE, "flipped", "cut"])
def test_gc_never_takes_a_damaged_root_for_none(
    store: Store, graph: StageGraph, damage: bytes | str, capsys: pytest.CaptureFixture[str]
) -> None:
    key = next(iter(graph.stages))
    store.artifacts.commit(Manifest(key=key, kind="data", spec={}, attempt="old-0-0"))
    path = path_of("roots", graph)
    whole = store.objects.get(path)
    assert whole is not None
    plan = plan_gc(store, grid_roots(store), 0)
    assert key in plan.keep
    broken = {"flipped": flipped(whole), "cut": whole[: len(whole) // 2]}.get(str(damage), damage)
    store.objects.put(path, broken)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=path):
        grid_roots(store)
    with pytest.raises(StoreError):
        collect(store, plan_gc(store, set(), 0))  # damaged while the collection goes on
    assert cli.main(["gc", "--delete", "--grace", "0"]) == EXIT_UNREACHABLE
    assert "nothing is collected" in capsys.readouterr().err
    assert store.artifacts.keys() == {key}


def test_a_damaged_root_is_written_again_by_the_next_run(store: Store, graph: StageGraph) -> None:
    path = path_of("roots", graph)
    whole = store.objects.get(path)
    assert whole is not None
    for damage in (b"", b"garbage", flipped(whole)):
        store.objects.put(path, damage)
        Context(None, None, store, "").write_root(graph)  # type: ignore[arg-type]
        assert grid_roots(store) == set(graph.stages)


def test_a_damaged_claim_can_be_taken_and_its_holder_stops(store: Store, graph: StageGraph) -> None:
    stage = next(iter(graph.stages))
    lease = store.claims.claim(stage, ATTEMPT, 600.0)
    assert lease is not None
    for damage in (*DAMAGE, b'{"attempt": "driver-0-0", "token": "x"}', b'{"attempt": 7}'):
        store.objects.put(f"claims/{stage}.json", damage)
        with pytest.raises(LeaseLost):
            store.claims.check(lease)
        with pytest.raises(LeaseLost):
            store.claims.enter(stage, ATTEMPT)
        assert store.claims.states([stage])[stage].released
        again = store.claims.claim(stage, "another-0-0", 600.0)
        assert again is not None
        store.claims.check(again)


def test_a_damaged_claim_is_noticed_without_assertions(tmp_path: Path) -> None:
    program = (
        "import sys; from orchestrator.store import Store; store = Store.open(sys.argv[1])\n"
        "for body in (b'', b'{}', b'[]', b'null', b'{\"token\": 1}'):\n"
        "    store.objects.put('claims/s.json', body); print(store.claims.states()['s'].released)\n"
        "    print(store.claims.claim('s', 'a-0-0', 60.0) is not None)"
    )
    command = [sys.executable, "-O", "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.stdout.split() == ["True"] * 10, done.stderr


def test_a_seal_tells_every_change() -> None:
    document: dict[str, Any] = {"keys": ["a", "b"], "name": "é", "n": 1.5}
    data = seal(document)
    assert parse(data) == document
    assert sound(data)
    assert parse(b'{"keys": []}') == {"keys": []}, "one that an older program wrote"
    assert sound(b'{"keys": []}')
    for at in range(len(data)):
        changed = bytearray(data)
        changed[at] ^= 0x01
        try:
            same = parse(bytes(changed))
        except ValueError:
            assert not sound(bytes(changed))
            continue
        # Only the seal's own name can change unseen: the content is whole.
        assert {name: value for name, value in same.items() if name in document} == document


def driving(graph: StageGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Engine, Scheduler, Store]:
    """Return an engine whose first tick has submitted one job, its scheduler and its store."""
    monkeypatch.setenv("MOEGRID_RUN_DIR", str(tmp_path))
    store, scheduler = Store.open(str(tmp_path / "store")), Scheduler(room=1)
    drive = Engine(graph, store, scheduler, Options())
    drive.begin()
    drive.tick()
    return drive, scheduler, store


def test_an_artifact_damaged_before_the_tick_is_made_again_and_is_no_fault(
    graph: StageGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive, scheduler, store = driving(graph, tmp_path, monkeypatch)
    job = scheduler.batches[0].jobs[0]
    key = stages_of(store, scheduler.batches[0].name)[0]
    store.artifacts.commit(Manifest(key=key, kind="data", spec={}, attempt=job.attempt))
    path = tmp_path / "store" / "artifacts" / f"{key}.json"
    path.write_bytes(path.read_bytes()[:-5])
    store.put_json(f"attempts/{job.attempt}/heartbeat.json", {"time": 1.0, "exit_code": 0})
    scheduler.states[job.attempt] = JobState(ENDED, 0)
    snapshot = drive.tick()
    assert [failure.kind for failure in snapshot.failed] == ["corrupt"]
    assert "damaged or gone" in snapshot.failed[0].message
    assert key in stages_of(store, scheduler.batches[1].name), "it is made again at once"


def test_a_process_that_left_by_itself_has_not_committed(
    graph: StageGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive, scheduler, store = driving(graph, tmp_path, monkeypatch)
    job = scheduler.batches[0].jobs[0]
    key = stages_of(store, scheduler.batches[0].name)[0]
    store.put_json(f"attempts/{job.attempt}/heartbeat.json", {"time": 1.0, "step": 1})
    scheduler.states[job.attempt] = JobState(ENDED, 0)
    assert [failure.kind for failure in drive.tick().failed] == ["error"]
    assert key not in {stage for batch in scheduler.batches[1:] for stage in stages_of(store, batch.name)}
