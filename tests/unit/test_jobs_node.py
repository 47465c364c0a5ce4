"""What a node does around its stages: failure records, the cache of a remote store, logs, the world, patience."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest

from jobs.node import failures, numerics
from jobs.node.cache import prune_cache
from jobs.node.context import StageContext
from jobs.node.patience import patiently
from jobs.node.preemption import STOP_SIGNALS, Preempted, Signals
from jobs.node.world import Forked, World, launch, world_from
from jobs.run import run_job
from jobs.train.errors import NotFinite
from orchestrator.backends.base import ENDED, JobState
from orchestrator.engine.failures import classify, spoken
from orchestrator.errors import (
    EXIT_AWAY,
    ArtifactMissing,
    CorruptBlob,
    LeaseLost,
    NumericsError,
    ServiceAway,
    SourceAway,
    SourceError,
    StoreError,
)
from orchestrator.spec.cell import Execution, Parallel, Resources
from orchestrator.store import Store
from tests.training import ROOT, TOKENIZER, init_work, key, make_job, prepare


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (NotFinite("loss nan"), "nan"),
        (MemoryError(), "oom"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "oom"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk_full"),
        (ModuleNotFoundError("No module named 'x'"), "import"),
        (CorruptBlob("a" * 64, "blobs/x", "size"), "corrupt"),
        (SourceError("no column 'text'"), "source"),
        (SourceError("row 3 is no JSON", cause="it reads: connection refused, no space left on device"), "source"),
        (SourceAway("the wheel could not be fetched"), "source_away"),
        (ServiceAway("the moderation server could not be asked"), "unreachable"),
        (ArtifactMissing("artifact abc does not exist"), "parent_missing"),
        (StoreError("away"), "unreachable"),
        (OSError(errno.ESTALE, "Stale file handle"), "unreachable"),
        (OSError(errno.EIO, "Input/output error"), "unreachable"),
        (OSError(errno.EROFS, "Read-only file system"), "unreachable"),
        (RuntimeError("I/O error: Stale file handle (os error 116)"), "unreachable"),
        (TimeoutError("timed out"), "unreachable"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/data/mine.jsonl"), "error"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/mine.jsonl"), "error"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "error"),
        (KeyError("connection refused"), "error"),
        (LeaseLost("gone"), "lease_lost"),
        (AssertionError("x"), "assertion"),
        (ValueError("x"), "error"),
    ],
)
def test_failure_kinds(error: BaseException, kind: str) -> None:
    record = failures.describe("s" * 64, error)
    assert record["kind"] == kind
    away = ("unreachable", "disk_full", "corrupt", "parent_missing", "source_away")
    assert record["exit_code"] == (76 if kind == "lease_lost" else 69 if kind in away else 1)
    assert (record.get("artifact") == "a" * 64) == (kind == "corrupt")


def test_cause_of_an_error_decides_its_kind() -> None:
    error = RuntimeError("could not save")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert failures.kind_of(error) == "disk_full"


def test_an_error_that_hides_its_cause_is_judged_by_itself() -> None:
    error = ValueError("the answer has no field 'text'")
    error.__context__ = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    assert failures.kind_of(error) == "unreachable"
    error.__suppress_context__ = True  # raise ... from None
    assert failures.kind_of(error) == "error"


@pytest.mark.parametrize("damage", [b"", b"<html>busy</html>", b"[]", b'{"jobs": 3}', b'{"jobs": [{}]}'])
def test_a_submission_that_cannot_be_read_is_no_fault_of_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    monkeypatch.setattr("jobs.node.opening.START_PATIENCE_SECONDS", 0.0)
    store = Store.open(str(tmp_path))
    store.objects.put("submissions/b.json", damage)
    assert run_job(str(tmp_path), "b", 0, Signals()) == EXIT_AWAY
    report = store.get_json("attempts/b-0/failure.json")
    assert (report["kind"], report["exit_code"]) == ("unreachable", EXIT_AWAY)


def test_a_flipped_byte_of_a_submission_is_no_bad_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.node.opening.START_PATIENCE_SECONDS", 0.0)
    store = Store.open(str(tmp_path))
    job = {"attempt": "b-0", "stages": [{"key": "k" * 64, "label": "one", "work": {"kind": "data"}}]}
    store.create_json("submissions/b.json", {"jobs": [job]})
    body = store.objects.get("submissions/b.json")
    assert body is not None
    store.objects.put("submissions/b.json", body.replace(b"data", b"dat!"))
    assert run_job(str(tmp_path), "b", 0, Signals()) == EXIT_AWAY


@pytest.mark.parametrize("gone", ["folder", "store"])
def test_a_store_that_is_not_mounted_is_not_made_by_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], gone: str
) -> None:
    monkeypatch.setattr("jobs.node.opening.START_PATIENCE_SECONDS", 0.0)
    target = tmp_path / "mount"
    if gone == "store":
        target.mkdir()
    assert run_job(str(target), "b", 0, Signals()) == EXIT_AWAY
    assert not target.exists() or not any(target.iterdir())
    log = capfd.readouterr().err
    told = spoken(log, "b-0")
    assert told is not None
    assert (told["kind"], told["exit_code"]) == ("unreachable", EXIT_AWAY)
    verdict = classify(JobState(ENDED, EXIT_AWAY), None, log)
    assert verdict.kind == "unreachable"
    assert "there is no store in" in verdict.message


def test_numerics_are_compared_field_by_field() -> None:
    own = numerics.record(Execution(), Resources(cores=2), 1)
    numerics.refuse_other({**own, "unknown": 1}, own, "a state")
    with pytest.raises(NumericsError, match="engine ddp -> torch"):
        numerics.refuse_other({**own, "engine": "ddp"}, own, "a state")


def test_products_round_to_tf32_only_where_the_grid_says_so_and_states_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    matmul, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    found = {}
    try:
        for asked in (False, True, False):
            torch.set_float32_matmul_precision("high")  # as a package may, at import
            numerics.keep_products(Execution(tf32=asked))
            assert (matmul.allow_tf32, convolutions.allow_tf32) == (asked, asked)
            assert not matmul.allow_bf16_reduced_precision_reduction
            found[asked] = numerics.record(Execution(tf32=asked), Resources(), 1)
            assert found[asked]["tf32"] is asked
        torch.set_float32_matmul_precision("medium")
        assert numerics.record(Execution(), Resources(), 1)["tf32"]  # whoever did it later
    finally:
        torch.set_float32_matmul_precision("highest")
    for made, own in ((True, False), (False, True)):
        with pytest.raises(NumericsError, match=f"tf32 {made} -> {own}"):
            numerics.refuse_other(found[made], found[own], "a state")
    earlier = {name: value for name, value in found[False].items() if name != "tf32"}
    numerics.refuse_other(earlier, found[False], "a state")
    with pytest.raises(NumericsError, match="tf32 False -> True"):
        numerics.refuse_other(earlier, found[True], "a state")


def test_what_else_a_process_does_is_in_no_numerics_of_a_stage_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    loaded = numerics.of_stage("tokens", Execution(), Resources(), 1)
    assert numerics.of_stage("train", Execution(), Resources(), 1).keys() > {"cpu_capability", "mkl_branch", "cpu"}
    monkeypatch.delitem(sys.modules, "torch")
    assert numerics.of_stage("tokens", Execution(), Resources(), 1) == loaded


def test_a_mesh_is_in_the_numerics_of_training_alone_and_was_none_before() -> None:
    execution = Execution(engine="fsdp", parallel=Parallel(shard=2, expert=2))
    trained = numerics.of_stage("train", execution, Resources(), 4)
    assert trained["mesh"] == "data 2 x shard 2, expert 2"
    assert numerics.of_stage("evaluate", execution, Resources(), 1)["mesh"] == ""
    before = {name: value for name, value in trained.items() if name != "mesh"}
    assert numerics.differing(before, trained) == {"mesh": ("", "data 2 x shard 2, expert 2")}
    assert not numerics.differing(before, {**trained, "mesh": Parallel().name(4)})


def test_ranks_are_forks_where_no_thread_would_stay_behind(tmp_path: Path) -> None:
    """The client of a bucket has threads, without which a fork would wait for ever for an answer."""
    code = (
        "from jobs.node import numerics; from orchestrator.store import Store; found = [numerics.may_fork()];"
        "numerics.prepare_forks(); found.append(numerics.may_fork());"
        f"Store.open({str(tmp_path)!r}).get_json('x');"
        "found.append(numerics.may_fork());"
        "Store.open('memory://x').get_json('x'); found.append(numerics.may_fork()); print(found)"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert told == "[False, True, True, False]\n"


def test_a_signal_between_a_ranks_end_and_its_note_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Forked({}, lambda: 5)
    wait, handled = os.waitpid, 0

    def interrupted(pid: int, options: int) -> tuple[int, int]:
        nonlocal handled
        found = wait(pid, options)
        if found[0]:
            handled += 1
            rank.send_signal(signal.SIGTERM)  # as the launcher's handler does
        return found

    monkeypatch.setattr(os, "waitpid", interrupted)
    while rank.poll() is None:
        time.sleep(0.01)
    assert (rank.poll(), handled) == (5, 1)


def test_a_forked_rank_ends_as_a_process_does(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> int:
        raise ValueError("no such thing")

    def sleep() -> int:
        time.sleep(60)
        return 0

    def place() -> int:
        return int(os.environ["RANK"])

    ranks = [Forked({"RANK": "3"}, run) for run in (place, fail, sleep)]
    ranks[2].kill()
    codes: list[int | None] = [None]
    while None in codes:
        codes = [rank.poll() for rank in ranks]
    assert codes == [3, 1, -signal.SIGKILL]
    assert "ValueError: no such thing" in capfd.readouterr().err
    assert "RANK" not in os.environ
    ranks[2].send_signal(signal.SIGTERM)  # nobody has its id any more


def test_forked_ranks_are_a_job_as_others_are() -> None:
    def run() -> int:
        if os.environ["RANK"] == "1":
            return 7
        time.sleep(60)
        return 0

    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        with patch("jobs.node.world.GRACE_SECONDS", 0.2):
            assert launch([], 2, run) == 7, "the rank that failed by itself is the cause"
        assert launch([], 2, lambda: 0) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_blobs_of_a_remote_store_are_cached_by_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGRID_CACHE", str(tmp_path))
    store = prepare("memory://node-cache")
    context = StageContext(make_job(store, [init_work()]), init_work().key())
    folder = context.directory(key("text"))
    assert {path.name for path in folder.iterdir()} == {blob.name for blob in context.manifest(key("text")).blobs}
    cached = context.fetch(TOKENIZER, "special.json")
    assert cached.is_relative_to(tmp_path)
    assert cached.read_bytes() == b"{}"
    prune_cache(tmp_path / "blobs", keep=cached, limit=0, used=0.0)
    assert list((tmp_path / "blobs").glob("*/*")) == [cached]


def test_commit_of_a_lost_stage_is_refused(tmp_path: Path) -> None:
    store = prepare(str(tmp_path))
    work = init_work()
    context = StageContext(make_job(store, [work]), work.key())
    lease = context.job.reporter.lease(work.key())
    assert lease is not None
    store.claims.release(lease)
    assert store.claims.claim(work.key(), "other", 60.0) is not None
    with pytest.raises(LeaseLost):
        context.commit(work, blobs={"weights.safetensors": b"x"})
    assert store.artifacts.get(work.key()) is None


def test_loser_of_a_race_gets_the_winners_manifest(tmp_path: Path) -> None:
    store = prepare(str(tmp_path))
    work = init_work()
    context = StageContext(make_job(store, [work]), work.key())
    first = context.commit(work, blobs={"weights.safetensors": b"first"})
    second = context.commit(work, blobs={"weights.safetensors": b"second"})
    assert second.blobs == first.blobs


def test_an_unreachable_store_is_waited_for_but_not_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    calls = 0

    def sometimes() -> str:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise StoreError("away")
        return "here"

    assert patiently(sometimes, "test") == "here"

    def full() -> str:
        nonlocal calls
        calls += 1
        raise StoreError("disk full") from OSError(errno.ENOSPC, "full")

    calls = 0
    with pytest.raises(StoreError):
        patiently(full, "test")
    assert calls == 1


def test_signals_interrupt_unless_deferred() -> None:
    signals = Signals()
    with signals.deferred():
        signals._handle(15, None)
    assert signals.requested == "SIGTERM"
    with pytest.raises(Preempted):
        signals.check()
    with pytest.raises(Preempted):
        Signals()._handle(10 + 2, None)


def test_world_from_torchrun_slurm_or_nobody() -> None:
    assert world_from({}) is None
    assert world_from({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}) is None  # no meeting point: not our ranks
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
    slurm = {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "4",
        "SLURM_LOCALID": "1",
        "MASTER_ADDR": "n0",
        "MASTER_PORT": "29500",
    }
    assert world_from(torchrun) == world_from(slurm) == World(3, 1, 4, "n0", 29500)


@pytest.mark.parametrize("same_file", [True, False])
def test_log_is_read_from_the_schedulers_file_or_redirected(tmp_path: Path, same_file: bool) -> None:
    program = (
        "import pathlib, sys, os; sys.path.insert(0, os.getcwd()); from jobs.node.logs import LogFile\n"
        "print('before', flush=True)\n"
        f"log = LogFile(pathlib.Path({str(tmp_path)!r})); os.system('echo from a child'); print('after', flush=True)\n"
        "log.forward(); pathlib.Path(sys.argv[1]).write_bytes(log.read())"
    )
    output, shipped = tmp_path / "scheduler.txt", tmp_path / "shipped.txt"
    command = [sys.executable, "-c", program, str(shipped)]
    if same_file:
        with output.open("ab") as file:
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=True, cwd=ROOT, env=os.environ)
    else:
        done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT, env=os.environ)
        output.write_bytes(done.stdout)
    assert shipped.read_text() == "from a child\nafter\n"
    assert output.read_text() == "before\nfrom a child\nafter\n"
