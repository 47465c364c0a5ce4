"""The Ray backend on a real cluster of two nodes, with trivial jobs: what it starts, says, finds again and stops."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.backends.base import ENDED, QUEUED, RUNNING, Batch, Handle, Job, JobState
from orchestrator.backends.ray import RayBackend, RaySite, _connect
from orchestrator.errors import MoegridError
from orchestrator.spec.cell import Resources
from tests.lab_ray import RayLab
from tests.lab_slurm import eventually

ROOT = Path(__file__).parents[2]
SMALL = Resources(memory_gb=0.125)
_names = itertools.count()
SLEEPER = """
    import signal, sys, time
    def stop(number, frame):
        print("stopped by " + signal.Signals(number).name, flush=True)
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    print("started", flush=True)
    time.sleep(600)
"""


def batch_of(count: int, resources: Resources = SMALL) -> Batch:
    name = f"test{os.getpid()}-{next(_names)}"
    jobs = tuple(Job(f"{name}-{index}", index, f"job {index}", resources) for index in range(count))
    return Batch(name, "a store", jobs, {"FOR_NODES": "through the environment"})


def backend_for(tmp_path: Path, program: str, **site: object) -> RayBackend:
    """A backend whose jobs run `program` (Python) in place of jobs.run."""
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(program))
    settings = {"log_directory": str(tmp_path / "logs"), **site}
    return RayBackend(RaySite.of(settings), program=(sys.executable, "-S", str(path)))


@pytest.fixture(autouse=True)
def clean(ray_lab: RayLab, tmp_path: Path) -> Iterator[None]:
    """Each test begins with an idle cluster and leaves nothing on it, however it ends."""
    eventually(idle)
    yield
    import ray

    for entry in ray.util.list_named_actors(all_namespaces=True):
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(entry["name"], namespace=entry["namespace"]))
    for group in ray.util.placement_group_table().values():
        if group["state"] != "REMOVED":
            ray.util.remove_placement_group(ray.util.get_placement_group(group["name"]))
    eventually(idle)


def idle() -> bool:
    """Are all cores of the cluster's living nodes free?"""
    backend = RayBackend(RaySite.of({}))
    backend.check()  # connects
    import ray

    there, free = ray.cluster_resources(), ray.available_resources()
    return there.get("CPU", 0) > 0 and free.get("CPU", 0) == there["CPU"]


def settle(backend: RayBackend, handles: dict[str, Handle], seconds: float = 180.0) -> dict[str, JobState]:
    """Poll until all have ended."""
    states: dict[str, JobState] = {}

    def ended() -> bool:
        states.update(backend.poll(list(handles.values())))
        return all(state.phase == ENDED for state in states.values())

    eventually(ended, seconds)
    return states


def text(backend: RayBackend, handle: Handle) -> str:
    path = backend.log(handle)
    return path.read_text() if path else ""


def test_each_job_gets_its_index_and_its_own_exit_code_and_log(ray_lab: RayLab, tmp_path: Path) -> None:
    backend = backend_for(
        tmp_path,
        """
        import os, sys
        print(sys.argv[1:], os.environ["FOR_NODES"], os.environ["OMP_NUM_THREADS"], flush=True)
        if sys.argv[-1] == "2":
            os.kill(os.getpid(), 9)
        sys.exit(int(sys.argv[-1]))
        """,
    )
    batch = batch_of(3)
    handles = backend.submit(batch)
    states = settle(backend, handles)
    ends = [(states[job.attempt].exit_code, states[job.attempt].signal) for job in batch.jobs]
    assert ends == [(0, 0), (1, 0), (None, signal.SIGKILL)]
    expected = ["--store", batch.store, "--batch", batch.name, "--job", "1"]
    assert text(backend, handles[f"{batch.name}-1"]) == f"{expected} through the environment 1\n"
    backend.forget(list(handles.values()))
    eventually(lambda: backend.find(batch.name) == {})


def answers(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls of Ray that wait for an answer of the cluster, from here on."""
    import ray

    counts: Counter[str] = Counter()

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            return real(*arguments, **named)

        return call

    for owner, names in ((ray, "wait nodes get_actor"), (ray.util, "list_named_actors get_placement_group")):
        for name in names.split():
            monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    return counts


def test_jobs_that_start_and_end_together_are_asked_for_together(
    ray_lab: RayLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backend_for(tmp_path, "import sys; print('job', sys.argv[-1], flush=True); sys.exit(3)")
    counts = answers(monkeypatch)
    for number in (1, 5):
        batch = batch_of(number)
        counts.clear()
        handles = backend.submit(batch)
        assert dict(counts) == {"nodes": 1, "get_actor": number}, "Ray itself asks whether a new name is free"
        settle(backend, handles)  # what is polled again from here on has ended
        counts.clear()
        states = backend.poll(list(handles.values()))
        assert {state.exit_code for state in states.values()} == {3}
        polled = dict(counts)
        assert polled == {"wait": 2}
        assert [text(backend, handles[job.attempt]) for job in batch.jobs] == [f"job {i}\n" for i in range(number)]
        backend.forget(list(handles.values()))
        assert dict(counts) == polled, "output was fetched with the end, and its own actors and groups are known"


def test_ranks_find_each_other_across_nodes(ray_lab: RayLab, tmp_path: Path) -> None:
    backend = backend_for(
        tmp_path,
        """
        import os, socket, time
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if rank == 0:
            server = socket.create_server(address)
            print(sorted(server.accept()[0].recv(100).decode() for _ in range(size - 1)), flush=True)
        else:
            for _ in range(600):
                try:
                    client = socket.create_connection(address)
                    break
                except OSError:
                    time.sleep(0.1)
            client.send(f"{rank} {os.environ['LOCAL_RANK']}".encode())
        """,
    )
    handles = backend.submit(batch_of(1, Resources(nodes=2, processes=2, memory_gb=0.125)))
    (handle,) = handles.values()
    assert settle(backend, handles)[handle.attempt].exit_code == 0
    assert "['1 1', '2 0', '3 1']" in text(backend, handle)
    backend.forget([handle])


def test_a_job_waits_for_its_resources_and_can_be_cancelled(ray_lab: RayLab, tmp_path: Path) -> None:
    backend = backend_for(tmp_path, SLEEPER)
    handles = backend.submit(batch_of(3, Resources(cores=4, memory_gb=0.125)))

    def by_phase(phase: str) -> list[Handle]:
        states = backend.poll(list(handles.values()))
        return [handle for attempt, handle in handles.items() if states[attempt].phase == phase]

    # There is room for two of them; Ray chooses which.
    eventually(lambda: len(by_phase(RUNNING)) == 2)
    one, two = by_phase(RUNNING)
    (three,) = by_phase(QUEUED)
    backend.cancel([three], now=False)
    assert backend.poll([three])[three.attempt].phase == ENDED
    eventually(lambda: "started" in text(backend, one) and "started" in text(backend, two))
    backend.cancel([one], now=False)
    backend.cancel([two], now=True)
    states = settle(backend, {one.attempt: one, two.attempt: two})
    assert (states[one.attempt].exit_code, states[two.attempt].signal) == (75, signal.SIGKILL)
    assert "stopped by SIGTERM" in text(backend, one)
    backend.forget([one, two])


def test_jobs_outlive_their_driver_and_are_found_by_name(ray_lab: RayLab, tmp_path: Path) -> None:
    backend = backend_for(tmp_path, SLEEPER)
    batch = batch_of(2)
    driver = f"""
        import sys
        from pathlib import Path
        from tests.integration.test_ray import *
        backend = backend_for(Path({str(tmp_path)!r}), SLEEPER)
        batch = batch_of(2)
        object.__setattr__(batch, "name", {batch.name!r})
        object.__setattr__(batch, "jobs", tuple(Job(f"{batch.name}-{{i}}", i, "", SMALL) for i in range(2)))
        handles = backend.submit(batch)
        eventually(lambda: all(state.phase == RUNNING for state in backend.poll(list(handles.values())).values()))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(driver)], cwd=ROOT, check=False, timeout=300)
    handles = backend.find(batch.name)
    assert sorted(handles) == [f"{batch.name}-0", f"{batch.name}-1"]
    assert {state.phase for state in backend.poll(list(handles.values())).values()} == {RUNNING}
    eventually(lambda: all("started" in text(backend, handle) for handle in handles.values()))  # it catches signals
    backend.cancel(list(handles.values()), now=False)
    assert {state.exit_code for state in settle(backend, handles).values()} == {75}
    backend.forget(list(handles.values()))


def test_a_lost_node_ends_its_jobs_and_is_named(ray_lab: RayLab, tmp_path: Path) -> None:
    backend = backend_for(tmp_path, SLEEPER)
    handles = backend.submit(batch_of(1, Resources(nodes=2, memory_gb=0.125)))
    (handle,) = handles.values()
    eventually(lambda: text(backend, handle).count("started") == 2)
    ray_lab.kill_node("node2")
    try:
        state = settle(backend, handles)[handle.attempt]
        assert state.reason == "NODE_FAIL"
        backend.forget([handle])
        again = backend.submit(batch_of(1))
        eventually(lambda: all(state.phase == RUNNING for state in backend.poll(list(again.values())).values()))
        backend.cancel(list(again.values()), now=True)
        settle(backend, again)
        backend.forget(list(again.values()))
    finally:
        ray_lab.up()
    eventually(lambda: backend.check().startswith("2 nodes"))


@pytest.mark.faults
def test_ranks_that_wait_for_one_that_failed_are_ended(ray_lab: RayLab, tmp_path: Path) -> None:
    program = 'import os, sys, time; sys.exit(1) if os.environ["RANK"] == "0" else time.sleep(600)'
    backend = backend_for(tmp_path, program)
    for resources in (Resources(processes=2, memory_gb=0.125), Resources(nodes=2, memory_gb=0.125)):
        handles = backend.submit(batch_of(1, resources))
        (handle,) = handles.values()
        assert settle(backend, handles)[handle.attempt].exit_code == 1
        backend.forget([handle])


@pytest.mark.parametrize("settings", [{"adress": "auto"}])
def test_a_misspelt_setting_is_refused(settings: dict[str, str]) -> None:
    with pytest.raises(Exception, match="adress"):
        RaySite.of(settings)


def test_a_client_connection_without_its_package_says_what_to_install() -> None:
    if importlib.util.find_spec("grpc") is not None:
        pytest.skip("grpcio is installed")
    with pytest.raises(MoegridError, match="from outside") as caught:
        _connect(None, "ray://127.0.0.1:10001")
    assert "ray[client]" in caught.value.hint
