"""The local backend with real processes: found again by any driver, never a stranger signalled, within the budget."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.backends import host
from orchestrator.backends.base import ABSENT, ELSEWHERE, ENDED, RUNNING, Batch, Handle, Job, JobState
from orchestrator.backends.local import Budget, LocalBackend
from orchestrator.resources import ROOT
from orchestrator.spec.cell import Resources

JOB = """
import os, signal, sys, time
behaviour = os.environ["BEHAVIOUR"]
if behaviour == "stop":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
print("threads", os.environ["OMP_NUM_THREADS"], "session", os.getsid(0) == os.getpid(), flush=True)
print("heap", os.environ["GLIBC_TUNABLES"], flush=True)
if behaviour == "fail":
    sys.exit(3)
if behaviour == "family":
    child = os.fork()
    if child == 0:
        time.sleep(60)
    open(os.environ["CHILD"], "w").write(str(child))
    sys.exit(0)
time.sleep(60 if behaviour != "quick" else 0)
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """A job program; whatever it started ends with the test."""
    monkeypatch.setenv("MOEGRID_RUN_DIR", str(tmp_path / "run"))
    path = tmp_path / "job.py"
    path.write_text(JOB)
    yield (sys.executable, str(path))
    for record in (tmp_path / "run" / "jobs").glob("*.pid"):
        pid = int(record.read_text().split()[0])
        if str(path).encode() in Path(f"/proc/{pid}/cmdline").read_bytes() if Path(f"/proc/{pid}").exists() else False:
            os.kill(pid, signal.SIGKILL)


def batch(behaviour: str, *, count: int = 1, name: str = "b1", **environment: str) -> Batch:
    jobs = tuple(Job(f"{name}-{i}", i, "a job", Resources(cores=1, memory_gb=1)) for i in range(count))
    return Batch(name, "/store", jobs, {"BEHAVIOUR": behaviour, **environment})


def backend(program: tuple[str, ...], cores: int = 2) -> LocalBackend:
    return LocalBackend(budget=Budget(cores, 64.0, 0), program=program)


def wait(of: LocalBackend, handle: Handle, phase: str = ENDED, seconds: float = 20.0) -> JobState:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = of.poll([handle])[handle.attempt]
        if state.phase == phase:
            return state
        time.sleep(0.02)
    raise AssertionError(f"still {state}")


@pytest.mark.parametrize("own", ["", "glibc.malloc.arena_max=1"])
def test_exit_code_log_and_what_libraries_read_at_the_start(
    program: tuple[str, ...], own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if own:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    local = backend(program)
    handle = local.submit(batch("fail"))["b1-0"]
    assert wait(local, handle).exit_code == 3
    log = local.log(handle)
    assert log is not None
    assert log.read_text() == f"threads 1 session True\nheap {own or 'glibc.malloc.hugetlb=1'}\n"


def test_another_driver_finds_polls_and_stops_a_job(program: tuple[str, ...]) -> None:
    first = backend(program)
    handle = first.submit(batch("stop"))["b1-0"]
    second = backend(program)
    found = second.find("b1")
    assert found["b1-0"].details["pid"] == handle.details["pid"]
    assert second.poll([found["b1-0"]])["b1-0"].phase == RUNNING
    log = first.log(handle)
    assert log is not None
    while not log.read_text():
        time.sleep(0.02)
    second.cancel([found["b1-0"]], now=False)
    assert wait(first, handle).exit_code == 75
    assert second.poll([found["b1-0"]])["b1-0"].exit_code == 75, "the parent wrote down what only it could learn"


def test_a_job_survives_a_killed_driver(program: tuple[str, ...], tmp_path: Path) -> None:
    code = (
        "import sys, os, signal; from tests.integration.test_local_backend import *;"
        f"backend({program!r}).submit(batch('sleep')); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    later = backend(program)
    handle = later.find("b1")["b1-0"]
    assert later.poll([handle])["b1-0"].phase == RUNNING
    later.cancel([handle], now=True)
    assert wait(later, handle).exit_code is None


def test_a_recycled_process_id_is_neither_alive_nor_signalled(program: tuple[str, ...]) -> None:
    local = backend(program)
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        details = {"host": host.host_id(), "pid": stranger.pid, "started": "1", "log": "", "driver": [1, ""]}
        handle = Handle("b9-0", "b9", str(stranger.pid), details)
        assert local.poll([handle])["b9-0"].phase == ENDED
        local.cancel([handle], now=True)
        time.sleep(0.2)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_what_runs_on_another_machine_cannot_be_seen(program: tuple[str, ...]) -> None:
    details = {"host": "far:away:1", "pid": os.getpid(), "started": host.start_time(os.getpid()), "log": ""}
    assert backend(program).poll([Handle("b9-0", "b9", "1", details)])["b9-0"].phase == ELSEWHERE
    assert backend(program).find("b9") == {}
    assert ABSENT != ELSEWHERE


def test_the_budget_counts_the_jobs_of_all_drivers(program: tuple[str, ...]) -> None:
    one = Resources(cores=1, memory_gb=1)
    first, second = backend(program), backend(program)
    assert second.admit([one, one, one]) == [True, True, False]
    handle = first.submit(batch("sleep"))["b1-0"]
    assert second.admit([one, one]) == [True, False]
    assert second.admit([Resources(cores=8)]) == [False], "what is larger than the machine waits until it is idle"
    first.cancel([handle], now=True)
    wait(first, handle)
    assert second.admit([Resources(cores=8)]) == [True]
    assert second.admit([Resources(cores=8), one]) == [True, False]


def test_the_jobs_of_another_store_do_not_count(program: tuple[str, ...]) -> None:
    first = LocalBackend(budget=Budget(2, 64.0, 0), program=program, store="/store")
    first.submit(batch("sleep"))
    other = LocalBackend(budget=Budget(2, 64.0, 0), program=program, store="/another")
    assert first.admit([Resources(cores=2)]) == [False]
    assert other.admit([Resources(cores=2)]) == [True]


def test_a_small_job_may_pass_a_large_one_that_does_not_fit(program: tuple[str, ...]) -> None:
    local = backend(program)
    local.submit(batch("sleep"))
    assert local.admit([Resources(cores=2), Resources(cores=1)]) == [False, True]


def test_what_a_job_leaves_behind_ends_with_it(program: tuple[str, ...], tmp_path: Path) -> None:
    local = backend(program)
    handle = local.submit(batch("family", CHILD=str(tmp_path / "child")))["b1-0"]
    assert wait(local, handle).exit_code == 0
    child = int((tmp_path / "child").read_text())
    end = time.monotonic() + 5
    while host.start_time(child) and not host.is_zombie(child) and time.monotonic() < end:
        time.sleep(0.02)
    assert not host.start_time(child) or host.is_zombie(child)


def test_a_program_that_cannot_start_says_so(program: tuple[str, ...], tmp_path: Path) -> None:
    local = LocalBackend(budget=Budget(2, 64.0, 0), program=(str(tmp_path / "absent"),))
    handle = local.submit(batch("quick"))["b1-0"]
    assert wait(local, handle).exit_code == 127


def test_forgetting_leaves_no_record(program: tuple[str, ...], tmp_path: Path) -> None:
    local = backend(program)
    handle = local.submit(batch("quick"))["b1-0"]
    wait(local, handle)
    local.forget([handle])
    assert list((tmp_path / "run" / "jobs").iterdir()) == []
