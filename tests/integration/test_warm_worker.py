"""Jobs forked from a process with its imports done: each with session, log and end of its own, and with equal bits."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.backends import host
from orchestrator.backends.base import ENDED, RUNNING, Batch, Handle, Job, JobState
from orchestrator.backends.local import Budget, LocalBackend
from orchestrator.backends.warm import Targets
from orchestrator.resources import ROOT
from orchestrator.spec.cell import Resources
from tests.training import init_work, prepare, run_chain, segments, state_bits, submit

FAKE = Targets("tests.warm_targets:prepare", "tests.warm_targets:call")


@pytest.fixture(autouse=True)
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of records; whatever is recorded there ends with the test."""
    monkeypatch.setenv("MOEGRID_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield tmp_path / "run" / "jobs"
    for record in (tmp_path / "run" / "jobs").glob("*.pid"):
        pid, text = int(record.read_text().split()[0]), record.read_text()
        if host.alive(pid, text.rpartition(")")[2].split()[19]):
            os.kill(pid, signal.SIGKILL)


def batch(name: str, store: str = "/store") -> Batch:
    return Batch(name, store, (Job(f"{name}-0", 0, "a job", Resources(cores=1, memory_gb=1)),))


def wait(of: LocalBackend, handle: Handle, seconds: float = 60.0) -> JobState:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = of.poll([handle])[handle.attempt]
        if state.phase == ENDED:
            return state
        time.sleep(0.02)
    raise AssertionError(f"still {state}")


def warmed(targets: Targets = FAKE, store: str = "/store") -> LocalBackend:
    """Return a backend whose worker stands ready."""
    backend = LocalBackend(budget=Budget(4, 64.0, 0), warm=targets)
    backend.submit(Batch("of-none", store, (), more=True))
    host.run_directory()
    backend._records.mkdir(exist_ok=True)
    end = time.monotonic() + 120
    while (worker := backend._warm_worker(batch("x", store), batch("x", store).jobs[0])) is None:
        assert backend._targets is not None, "the worker has failed"
        assert time.monotonic() < end
        time.sleep(0.05)
    assert worker.ready
    return backend


def forked(backend: LocalBackend, name: str) -> Handle:
    handle = backend.submit(batch(name))[f"{name}-0"]
    assert backend._worker is not None
    assert handle.details["driver"][0] == backend._worker.pid, "it was not forked"
    return handle


def said(backend: LocalBackend, handle: Handle, words: str) -> str:
    """Return a job's log once it holds `words`."""
    path, end = Path(handle.details["log"]), time.monotonic() + 30
    while words not in (text := path.read_text()):
        assert time.monotonic() < end, text
        time.sleep(0.02)
    return text


def test_each_job_has_its_own_session_log_and_end() -> None:
    backend = warmed()
    ended = {name: forked(backend, name) for name in ("fail", "quick", "crash", "family")}
    states = {name: wait(backend, handle) for name, handle in ended.items()}
    assert {name: (state.exit_code, state.signal) for name, state in states.items()} == {
        "fail": (3, 0), "quick": (0, 0), "crash": (None, signal.SIGSEGV), "family": (0, 0),
    }  # fmt: skip
    assert states["quick"].max_rss_gb > 0
    for name, handle in ended.items():
        assert said(backend, handle, name).startswith(f"{name} prepared 1 \n")
    child = int(said(backend, ended["family"], "\n").split()[-1])
    end = time.monotonic() + 20
    while host.start_time(child) and not host.is_zombie(child):
        assert time.monotonic() < end, "what a job left behind goes on"
        time.sleep(0.02)


def test_a_worker_starts_beside_the_first_jobs_that_others_follow() -> None:
    """Nobody forks from the worker of a driver that is gone once it has submitted."""
    for more in (False, True):
        backend, name = LocalBackend(budget=Budget(4, 64.0, 0), warm=FAKE), f"first-{more}"
        handle = backend.submit(replace(batch(name), more=more))[f"{name}-0"]
        assert (backend._worker is not None) is more
        assert handle.details["driver"][0] == os.getpid()
        wait(backend, handle)
        if more:
            end = time.monotonic() + 120
            while not (backend._worker and backend._worker.ready):
                assert time.monotonic() < end
                time.sleep(0.05)
            assert wait(backend, forked(backend, "quick")).exit_code == 0


def test_a_kill_or_a_stop_takes_one_job_and_ends_wake_the_driver() -> None:
    backend = warmed()
    killed, stopped, asked = (forked(backend, name) for name in ("sleep-1", "sleep-2", "stop"))
    assert backend.ended() == 0
    os.kill(killed.details["pid"], signal.SIGKILL)
    os.kill(stopped.details["pid"], signal.SIGSTOP)
    said(backend, asked, "stop")
    while backend.ended() != 1:
        time.sleep(0.02)
    assert wait(backend, killed).signal == signal.SIGKILL
    assert wait(backend, forked(backend, "quick")).exit_code == 0, "the others wait for one that is stopped"
    backend.cancel([asked], now=False)
    assert wait(backend, asked).exit_code == 75
    assert backend.poll([stopped])[stopped.attempt].phase == RUNNING
    backend.cancel([stopped], now=True)
    assert wait(backend, stopped).signal == signal.SIGKILL


def test_jobs_outlive_a_killed_driver_and_their_ends_are_written_down() -> None:
    code = (
        "import os, signal; from tests.integration.test_warm_worker import *; b = warmed();"
        "forked(b, 'stop'); forked(b, 'sleep'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == -signal.SIGKILL
    later = LocalBackend(budget=Budget(4, 64.0, 0))
    handles = [later.find(name)[f"{name}-0"] for name in ("stop", "sleep")]
    assert [later.poll([handle])[handle.attempt].phase for handle in handles] == [RUNNING, RUNNING]
    said(later, handles[0], "stop")
    later.cancel(handles[:1], now=False)
    later.cancel(handles[1:], now=True)
    assert wait(later, handles[0]).exit_code == 75
    assert wait(later, handles[1]).signal == signal.SIGKILL
    server, started = handles[0].details["driver"]
    end = time.monotonic() + 20
    while host.alive(server, started) and not host.is_zombie(server):
        assert time.monotonic() < end, "the server outlives its last job"
        time.sleep(0.02)


def test_without_its_worker_a_job_goes_on_and_the_next_is_a_process_of_its_own() -> None:
    backend = warmed()
    handle = forked(backend, "stop")
    said(backend, handle, "stop")
    assert backend._worker is not None
    os.kill(backend._worker.pid, signal.SIGKILL)
    backend._worker._process.wait()
    assert backend.poll([handle])[handle.attempt].phase == RUNNING
    backend.cancel([handle], now=False)
    assert wait(backend, handle).exit_code is None, "nobody saw its end"
    backend._program = (sys.executable, "-c", "print('fresh')")
    fresh = backend.submit(batch("next"))["next-0"]
    assert wait(backend, fresh).exit_code == 0
    assert said(backend, fresh, "fresh") == "fresh\n"


def test_a_worker_that_hangs_is_killed_before_the_job_starts_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.backends.warm.ANSWER_SECONDS", 0.5)
    backend = warmed()
    worker = backend._worker
    assert worker is not None
    os.kill(worker.pid, signal.SIGSTOP)
    backend._program = (sys.executable, "-c", "print('fresh')")
    handle = backend.submit(batch("quick"))["quick-0"]
    assert worker.ended
    assert wait(backend, handle).exit_code == 0
    assert Path(handle.details["log"]).read_text() == "fresh\n"


def test_a_worker_whose_imports_fail_is_done_without() -> None:
    backend = LocalBackend(budget=Budget(4, 64.0, 0), warm=Targets("tests.warm_targets:broken", FAKE.call))
    backend.submit(Batch("of-none", "/store", (), more=True))
    backend._program = (sys.executable, "-c", "")
    assert wait(backend, backend.submit(batch("b1"))["b1-0"]).exit_code == 0
    assert backend._worker is not None
    backend._worker._process.wait()
    assert wait(backend, backend.submit(batch("b2"))["b2-0"]).exit_code == 0
    assert backend._targets is None


@pytest.mark.parametrize(
    ("resources", "together"),
    [
        (Resources(cores=1), True),
        (Resources(cores=2), False),
        (Resources(cores=2), True),  # what is no training starts anew, as the threads of some libraries are theirs
        (Resources(cores=1, processes=2), False),
    ],
    ids=["one core", "two threads", "two threads anew", "two ranks"],
)
def test_a_forked_job_commits_the_bits_of_a_process_of_its_own(
    tmp_path: Path, run_directory: Path, resources: Resources, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, alone or after what comes before it."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")  # its user's word counts whether or not the machine is idle
    work = segments([("router", 0, 16)])[0]
    found, told = [], []
    for kind in ("fresh", "warm"):
        store = prepare(str(tmp_path / kind))
        if not together:
            run_chain(store, [init_work()], "init-0")
        submit(store, [init_work(), work] if together else [work], kind, resources=resources)
        backend = LocalBackend(budget=Budget(4, 64.0, 0)) if kind == "fresh" else warmed(Targets(), store.url)
        asked = Batch(kind, store.url, (Job(f"{kind}-0", 0, "a job", resources),))
        handle = backend.submit(asked)[f"{kind}-0"]
        state = wait(backend, handle, 300.0)
        log = Path(handle.details["log"]).read_text()
        assert state.exit_code == 0, log
        found.append(state_bits(store, work.key()))
        manifest = store.artifacts.get(work.key())
        assert manifest is not None
        told.append((manifest.numerics, manifest.provenance["code"], len(log.splitlines())))
    assert backend._worker is not None
    assert handle.details["driver"][0] == backend._worker.pid
    assert found[0] == found[1]
    assert told[0] == told[1], log
    with contextlib.suppress(ProcessLookupError):
        os.kill(backend._worker.pid, signal.SIGTERM)
