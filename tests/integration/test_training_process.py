"""Node processes: the gate, signals, kills, failure records, logs and heartbeats."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.spec.cell import DataSpec, Resources
from orchestrator.spec.work import DataWork
from orchestrator.store import Store
from tests.training import (
    EXECUTION,
    TRAIN,
    failure,
    init_work,
    prepare,
    segments,
    start,
    state_bits,
    submit,
)

LONG = dataclasses.replace(TRAIN, steps=160)
SPARSE = dataclasses.replace(EXECUTION, checkpoint_steps=20, log_every=20)


def finish(process: subprocess.Popen[str], code: int) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output
    return output


def beat(store: Store, attempt: str, rank: int = 0) -> dict[str, Any]:
    data = store.objects.get(f"attempts/{attempt}/heartbeat{f'.{rank}' if rank else ''}.json")
    return dict(json.loads(data)) if data else {}


def wait_for_state(store: Store, key: str, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while store.artifacts.get(key) is None:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    store = prepare(str(tmp_path_factory.mktemp("straight")))
    work = segments([("", 0, 160)], LONG)[0]
    finish(start(submit(store, [init_work(), work], execution=SPARSE)), 0)
    return state_bits(store, work.key())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGKILL])
def test_stopped_process_resumes_to_the_same_bits(tmp_path: Path, number: int, straight: dict[str, str]) -> None:
    store = prepare(str(tmp_path))
    work = segments([("", 0, 160)], LONG)[0]
    process = start(submit(store, [init_work(), work], "first-0", execution=SPARSE, ttl=2.0))
    wait_for_state(store, work.key_at(40), process)
    process.send_signal(number)
    finish(process, -9 if number == signal.SIGKILL else 75)
    assert store.artifacts.get(work.key()) is None
    if number != signal.SIGKILL:
        reached = beat(store, "first-0")["step"]
        assert store.artifacts.get(work.key_at(reached)) is not None  # no step is lost
    else:
        time.sleep(2.1)
    finish(start(submit(store, [work], "second-0", execution=SPARSE)), 0)
    assert state_bits(store, work.key()) == straight
    log = (store.objects.get("attempts/second-0/log/0.txt") or b"").decode()
    assert "going on from step" in log
    assert "going on from step 0" not in log


def test_second_process_of_an_attempt_stops_at_the_gate(tmp_path: Path) -> None:
    store = prepare(str(tmp_path))
    command = submit(store, [init_work()])
    finish(start(command), 0)
    created = store.artifacts.get(init_work().key())
    output = finish(start(command), 76)
    assert "starting" not in output
    assert store.artifacts.get(init_work().key()) == created
    assert store.objects.get("attempts/batch-0/failure.json") is None


def test_lost_lease_stops_training_without_a_commit(tmp_path: Path) -> None:
    store = prepare(str(tmp_path))
    work = segments([("", 0, 4000)], dataclasses.replace(TRAIN, steps=4000))[0]
    execution = dataclasses.replace(EXECUTION, checkpoint_steps=20)
    process = start(submit(store, [init_work(), work], "old-0", execution=execution, ttl=4.0))
    wait_for_state(store, work.key_at(20), process)
    # The scheduler let go of the job, its lease ran out, another attempt holds the stage now.
    path = f"claims/{work.key()}.json"
    found = store.objects.get_versioned(path)
    assert found is not None
    body = {**json.loads(found[0]), "attempt": "new-0", "token": 99, "nonce": "other"}
    while not store.objects.replace(path, json.dumps(body).encode(), found[1]):
        found = store.objects.get_versioned(path)
        assert found is not None
    finish(process, 76)
    assert store.claims.states([work.key()])[work.key()].attempt == "new-0"
    assert store.artifacts.get(work.key()) is None


def test_nan_is_recorded_and_keeps_the_last_state(tmp_path: Path) -> None:
    store = prepare(str(tmp_path))
    work = segments([("", 0, 160)], dataclasses.replace(LONG, lr=1e30, clip=0.0, warmup_ratio=0.02))[0]
    execution = dataclasses.replace(EXECUTION, checkpoint_steps=1)
    finish(start(submit(store, [init_work(), work], execution=execution)), 1)
    record = failure(store)
    assert record["kind"] in ("nan", "diverged")
    assert record["stage"] == work.key()
    assert record["hint"]
    assert store.artifacts.get(work.key_at(1)) is not None


def test_failure_of_a_data_stage_has_a_kind_and_loads_no_torch(tmp_path: Path) -> None:
    store = prepare(str(tmp_path))
    work = DataWork(DataSpec("file:///does/not/exist.jsonl", digest="0"), 0)
    output = finish(start(submit(store, [work]), PYTHONPROFILEIMPORTTIME="1"), 1)
    assert failure(store)["kind"] == "source"
    assert " torch\n" not in output


# What comes with transformers and with torch's compiler, and costs more than all else that a start imports.
NEEDLESS = ("transformers", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "scipy", "sklearn")
# And what only a benchmark's items need.
NEEDLESS_IN_TRAINING = (*NEEDLESS, "datasets", "pandas", "lm_eval", "jinja2", "requests")


def imported(names: Sequence[str], command: Sequence[str]) -> list[str]:
    """Return which of the modules a job's process has imported when it has ended well."""
    code = "import sys; from jobs.run import main; code = main(sys.argv[1:]); print(*sys.modules); sys.exit(code)"
    output = finish(start([command[0], "-c", code, *command[3:]]), 0)
    return [name for name in names if name in output.split()]


def test_a_process_that_trains_imports_neither_transformers_nor_a_compiler(tmp_path: Path) -> None:
    store = prepare(str(tmp_path))
    train = dataclasses.replace(TRAIN, steps=1)
    assert imported(NEEDLESS_IN_TRAINING, submit(store, [init_work(), *segments([("", 0, 1)], train)])) == []


def test_wrong_payload_is_refused_before_any_work(tmp_path: Path) -> None:
    store = prepare(str(tmp_path))
    command = submit(store, [init_work()])
    submission = store.get_json("submissions/batch-0.json")
    assert submission is not None
    submission["jobs"][0]["stages"][0]["key"] = "0" * 64
    store.put_json("submissions/batch-0.json", submission)
    finish(start(command), 1)
    assert failure(store)["kind"] == "bad_spec"


def test_heartbeat_series_and_log_reach_the_store(tmp_path: Path) -> None:
    store = prepare(str(tmp_path))
    works = segments([("", 0, 80), ("router", 80, 160)], LONG)
    finish(start(submit(store, [init_work(), *works], execution=SPARSE)), 0)
    last = beat(store, "batch-0")
    assert (last["step"], last["total"], last["exit_code"]) == (160, 160, 0)
    chunks = [json.loads(store.objects.get(e.path) or b"") for e in store.objects.list("attempts/batch-0/series")]
    live = {(chunk["stage"], row["step"]): row for chunk in chunks for row in chunk["rows"]}
    committed = [
        (work.key(), row["step"], row["train/loss"])
        for work in works
        for row in json.loads(store.artifacts.read(store.artifacts.get(work.key()).blob("series.json")))
    ]
    assert [(stage, step, live[stage, step]["train/loss"]) for stage, step, _ in committed] == committed
    assert b"state at step 160 committed" in (store.objects.get("attempts/batch-0/log/0.txt") or b"")


def test_two_ranks_share_one_attempt(tmp_path: Path) -> None:
    store = prepare(str(tmp_path))
    work = segments([("", 0, 8)], dataclasses.replace(TRAIN, steps=8))[0]
    finish(start(submit(store, [init_work()], "init-0")), 0)
    finish(start(submit(store, [work], resources=Resources(processes=2))), 0)
    manifest = store.artifacts.get(work.key())
    assert manifest is not None
    assert manifest.numerics["world_size"] == 2
    assert {blob.name for blob in manifest.blobs} >= {
        "optimizer-00000-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors",
    }
    for rank in (0, 1):
        assert store.objects.get(f"attempts/batch-0/log/{rank}.txt")
    assert store.objects.get("attempts/batch-0/heartbeat.1.json")


def test_a_rank_that_stops_stepping_ends_the_job_as_hung(tmp_path: Path) -> None:
    store = prepare(str(tmp_path))
    work = segments([("", 0, 4000)], dataclasses.replace(TRAIN, steps=4000))[0]
    finish(start(submit(store, [init_work()], "init-0")), 0)
    execution = dataclasses.replace(EXECUTION, checkpoint_steps=10, hang_seconds=8.0)
    process = start(submit(store, [work], execution=execution, resources=Resources(processes=2)))
    wait_for_state(store, work.key_at(10), process)
    stuck = beat(store, "batch-0", rank=1)["pid"]
    os.kill(stuck, signal.SIGSTOP)  # leases and heartbeats of rank 0 would go on for ever
    finish(process, 1)
    record = failure(store)
    assert record["kind"] == "hung"
    assert "hangs" in record["message"]
    assert "all_reduce" in record["message"]  # where
    assert b"most recent call first" in (store.objects.get("attempts/batch-0/log/0.txt") or b"")
    assert not Path(f"/proc/{stuck}").exists()
