"""The SLURM backend on a real cluster, with trivial jobs: what it starts, says, finds again and stops."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator.backends import slurm_records
from orchestrator.backends.base import (
    ABSENT,
    ENDED,
    QUEUED,
    RUNNING,
    Batch,
    Handle,
    Job,
    JobState,
    SchedulerUnreachable,
)
from orchestrator.backends.slurm import SlurmBackend
from orchestrator.backends.slurm_script import SlurmSite
from orchestrator.spec.cell import Resources
from tests.lab_slurm import SlurmLab, eventually

SMALL = Resources(memory_gb=0.125, minutes=5)
_names = itertools.count()


def batch_of(store: Path, count: int, resources: Resources = SMALL) -> Batch:
    name = f"test{os.getpid()}-{next(_names)}"
    jobs = tuple(Job(f"{name}-{index}", index, f"job {index}", resources) for index in range(count))
    return Batch(name, str(store), jobs, {"SECRET_FOR_NODES": "through the environment"})


def backend_for(tmp_path: Path, program: str, **site: object) -> SlurmBackend:
    """A backend whose jobs run `program` (Python) in place of jobs.run."""
    path = tmp_path / "program.py"
    path.write_text(textwrap.dedent(program))
    return SlurmBackend(SlurmSite.of(site), log_directory=tmp_path / "logs", program=(sys.executable, "-S", str(path)))


@pytest.fixture(autouse=True)
def clean(slurm_lab: SlurmLab) -> Iterator[None]:
    """Each test leaves an empty queue, however it ends."""
    yield
    subprocess.run(["scancel", "--full", "--user=root"], check=False, timeout=60)
    eventually(lambda: not slurm_lab.run("squeue", "--noheader"))


def settle(backend: SlurmBackend, handles: dict[str, Handle], seconds: float = 180.0) -> dict[str, JobState]:
    """Poll until all have ended."""
    states: dict[str, JobState] = {}

    def ended() -> bool:
        states.update(backend.poll(list(handles.values())))
        return all(state.phase == ENDED for state in states.values())

    eventually(ended, seconds)
    return states


def text(backend: SlurmBackend, handle: Handle) -> str:
    path = backend.log(handle)
    return path.read_text() if path else ""


SLEEPER = """
    import os, signal, sys, time
    def say(line):  # In one write: the ranks of a job share a log, and an unbuffered print is several.
        os.write(1, (line + "\\n").encode())
    def stop(number, frame):
        say("stopped by " + signal.Signals(number).name)
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGUSR2, stop)
    say("started")
    time.sleep(600)
"""


def test_each_job_gets_its_index_and_its_own_exit_code_and_log(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    backend = backend_for(
        tmp_path,
        """
        import os, sys
        print(sys.argv[1:], os.environ["SECRET_FOR_NODES"], os.environ["OMP_NUM_THREADS"], flush=True)
        sys.exit(int(sys.argv[-1]))
        """,
    )
    batch = batch_of(tmp_path / "a store", 3)
    handles = backend.submit(batch)
    states = settle(backend, handles)
    assert [states[job.attempt].exit_code for job in batch.jobs] == [0, 1, 2]
    expected = ["--store", batch.store, "--batch", batch.name, "--job", "2"]
    assert text(backend, handles[f"{batch.name}-2"]) == f"{expected} through the environment 1\n"
    assert "through the environment" not in (tmp_path / "logs" / batch.name / "submission-0.sh").read_text()


def test_jobs_of_different_resources_run_as_one_batch(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    backend = backend_for(tmp_path, "import os, sys; print(sys.argv[-1], os.environ['OMP_NUM_THREADS'])", max_array=3)
    name = f"mixed{os.getpid()}"
    jobs = tuple(
        Job(f"{name}-{index}", index, "", Resources(cores=1 + index % 2, memory_gb=0.1, minutes=5))
        for index in range(5)
    )
    handles = backend.submit(Batch(name, "store", jobs))
    assert {handle.attempt: handle.id for handle in backend.find(name).values()} == {
        handle.attempt: handle.id for handle in handles.values()
    }
    settle(backend, handles)
    for job in jobs:
        assert text(backend, handles[job.attempt]) == f"{job.index} {job.resources.cores}\n"


def test_ranks_find_each_other_across_nodes(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    backend = backend_for(
        tmp_path,
        """
        import os, socket, sys, time
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        if rank == 0:
            server = socket.create_server(address)
            others = [server.accept()[0].recv(100).decode() for _ in range(size - 1)]
            print(sorted(others), flush=True)
        else:
            for _ in range(600):
                try:
                    client = socket.create_connection(address)
                    break
                except OSError:
                    time.sleep(0.1)
            local, node = os.environ["LOCAL_RANK"], os.environ["SLURMD_NODENAME"]
            client.send(f"{rank} {local} {node} {os.environ['CUDA_VISIBLE_DEVICES']}".encode())
        """,
    )
    batch = batch_of(tmp_path, 1, Resources(nodes=2, processes=2, gpus=2, memory_gb=0.25, minutes=5))
    handles = backend.submit(batch)
    (state,) = settle(backend, handles).values()
    log = text(backend, next(iter(handles.values())))
    assert state.exit_code == 0, log
    assert log.startswith("['1 1 n1 0,1', '2 0 n2 0,1', '3 1 n2 0,1']"), log


@pytest.mark.parametrize("resources", [SMALL, Resources(nodes=2, processes=2, memory_gb=0.125, minutes=5)])
def test_a_cancelled_job_may_save_its_state_first(slurm_lab: SlurmLab, tmp_path: Path, resources: Resources) -> None:
    backend = backend_for(tmp_path, SLEEPER)
    batch = batch_of(tmp_path, 1, resources)
    handles = backend.submit(batch)
    (handle,) = handles.values()
    ranks = resources.nodes * resources.processes
    eventually(lambda: text(backend, handle).count("started") == ranks)
    assert backend.poll([handle])[handle.attempt].phase == RUNNING
    backend.cancel(list(backend.find(batch.name).values()), now=False)
    state = settle(backend, handles)[handle.attempt]
    assert state.exit_code == 75
    assert text(backend, handle).count("stopped by SIGTERM") == ranks


def test_a_cancelled_queued_job_ends(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    backend = backend_for(tmp_path, SLEEPER, options={"hold": True})
    handles = backend.submit(batch_of(tmp_path, 5))
    states = backend.poll(list(handles.values()))
    assert {(state.phase, state.reason) for state in states.values()} == {(QUEUED, "JobHeldUser")}
    first, *others = handles.values()
    backend.cancel([first], now=False)
    # A task that is cancelled while its array waits leaves no trace anywhere.
    eventually(lambda: backend.poll([first])[first.attempt].phase in (ABSENT, ENDED))
    assert {state.phase for state in backend.poll(others).values()} == {QUEUED}
    backend.cancel(others, now=True)
    assert {state.reason for state in settle(backend, {one.attempt: one for one in others}).values()} == {"CANCELLED"}


def test_the_time_limit_is_announced_with_a_signal(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    backend = backend_for(tmp_path, SLEEPER)
    handles = backend.submit(batch_of(tmp_path, 1, Resources(memory_gb=0.125, minutes=1)))
    (handle,) = handles.values()
    eventually(lambda: text(backend, handle) == "started\n")
    assert "#SBATCH --signal=B:USR2@15" in (tmp_path / "logs" / handle.batch / "submission-0.sh").read_text()
    slurm_lab.run("scancel", "--batch", "--signal=USR2", handle.id)
    assert settle(backend, handles)[handle.attempt].exit_code == 75
    assert "stopped by SIGUSR2" in text(backend, handle)


def test_a_kill_for_memory_is_told_apart_from_a_bare_kill(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    backend = backend_for(
        tmp_path,
        """
        import os, signal, sys, time
        if sys.argv[-1] == "0":
            hoard = b"x" * (300 << 20)
            time.sleep(30)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    handles = backend.submit(batch_of(tmp_path, 2))
    hungry, killed = (settle(backend, handles)[attempt] for attempt in handles)
    assert hungry.reason == "OUT_OF_MEMORY", (hungry, text(backend, next(iter(handles.values()))))
    assert (killed.reason, killed.signal) == ("FAILED", signal.SIGKILL)


def test_a_requeued_job_starts_again_at_once(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    backend = backend_for(tmp_path, SLEEPER)
    handles = backend.submit(batch_of(tmp_path, 1))
    (handle,) = handles.values()
    eventually(lambda: text(backend, handle) == "started\n")
    slurm_lab.run("scontrol", "requeue", handle.id)
    begin = time.monotonic()

    def again() -> bool:
        backend.poll([handle])
        return text(backend, handle).count("started") == 2

    eventually(again)
    assert time.monotonic() - begin < 100  # left alone, SLURM waits for two minutes
    assert "stopped by SIGTERM" in text(backend, handle)
    backend.cancel([handle], now=False)
    settle(backend, handles)


def test_a_preempted_job_saves_and_comes_back(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    backend = backend_for(tmp_path, SLEEPER, qos="low")
    handles = backend.submit(batch_of(tmp_path, 1))
    (handle,) = handles.values()
    eventually(lambda: text(backend, handle) == "started\n")
    rush = ["--qos=high", "--nodes=4", "--exclusive", "--mem=0", "--time=1", "--output=/dev/null", "--wrap=sleep 1"]
    slurm_lab.run("sbatch", *rush)

    def again() -> bool:
        backend.poll([handle])
        return text(backend, handle).count("started") == 2

    eventually(again)
    assert "stopped by SIGTERM" in text(backend, handle)
    backend.cancel([handle], now=True)
    settle(backend, handles)


def test_a_submission_without_an_answer_is_found_by_its_name(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    backend = backend_for(tmp_path, "")
    batch = batch_of(tmp_path, 2)
    assert backend.find(batch.name) == {}
    handles = backend.submit(batch)
    other = backend_for(tmp_path, "")
    assert {a: h.id for a, h in other.find(batch.name).items()} == {a: h.id for a, h in handles.items()}
    settle(other, other.find(batch.name))
    assert {a: h.id for a, h in other.find(batch.name).items()} == {a: h.id for a, h in handles.items()}


def test_a_job_under_a_recycled_id_is_not_mistaken_for_ours(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    backend = backend_for(tmp_path, "")
    (stranger,) = backend.submit(batch_of(tmp_path, 1)).values()
    ours = Handle("old-0", "old", stranger.id, {**stranger.details, "name": "old"})
    assert backend.poll([ours])["old-0"].phase == ABSENT


@pytest.mark.parametrize("count", [10, 1000])
def test_a_submission_and_a_tick_cost_equally_many_calls_however_many_jobs(
    slurm_lab: SlurmLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    backend = backend_for(tmp_path, "", options={"hold": True})
    calls: list[str] = []
    real = slurm_records.call

    def counted(command: Sequence[str], **options: Any) -> str:
        calls.append(command[0])
        return real(command, **options)

    monkeypatch.setattr(slurm_records, "call", counted)
    handles = backend.submit(batch_of(tmp_path, count))
    assert calls == ["sbatch"]
    for over in ([], ["sacct"]):
        calls.clear()
        states = backend.poll(list(handles.values()))
        assert calls == ["squeue", *over]
        assert len(states) == count
        assert {state.phase for state in states.values()} == {ENDED if over else QUEUED}
        slurm_lab.run("scancel", "--full", "--user=root")
        eventually(lambda: not slurm_lab.run("squeue", "--noheader"))


def test_a_controller_that_is_away_is_a_typed_error_and_costs_no_job(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    program = """
        import pathlib, sys, time
        while not pathlib.Path(sys.argv[0]).with_name("end").exists():
            time.sleep(0.1)
        """
    backend = backend_for(tmp_path, program, command_timeout=3)
    handles = backend.submit(batch_of(tmp_path, 1))
    (handle,) = handles.values()
    eventually(lambda: backend.poll([handle])[handle.attempt].phase == RUNNING)
    slurm_lab.kill("slurmctld", signal.SIGTERM)
    try:
        with pytest.raises(SchedulerUnreachable):
            backend.poll([handle])
        with pytest.raises(SchedulerUnreachable):
            backend.submit(batch_of(tmp_path, 1))
        (tmp_path / "end").touch()
    finally:
        slurm_lab.start("slurmctld", "-f", slurm_lab.environment["SLURM_CONF"])
    eventually(lambda: subprocess.run(["scontrol", "ping"], capture_output=True, check=False).returncode == 0)
    assert settle(SlurmBackend(log_directory=tmp_path / "logs"), handles)[handle.attempt].exit_code == 0


@pytest.mark.faults
def test_a_job_on_a_node_that_dies_ends_as_node_failure(slurm_lab: SlurmLab, tmp_path: Path) -> None:
    backend = backend_for(tmp_path, SLEEPER, requeue=False, options={"nodelist": "n4"})
    handles = backend.submit(batch_of(tmp_path, 1))
    (handle,) = handles.values()
    eventually(lambda: "started" in text(backend, handle))
    slurm_lab.kill("slurmd.n4", signal.SIGKILL)
    _kill_steps("n4")
    try:
        assert settle(backend, handles)[handle.attempt].reason == "NODE_FAIL"
    finally:
        slurm_lab.start("slurmd", "-f", slurm_lab.environment["SLURM_CONF"], "-N", "n4")
    eventually(lambda: slurm_lab.run("sinfo", "-h", "-n", "n4", "-o", "%T").startswith("idle"))


def _kill_steps(node: str) -> None:
    """A dead node's processes die with it: the step daemons above its processes, then those."""
    processes, daemons = set(), set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"SLURMD_NODENAME={node}".encode() in (process / "environ").read_bytes().split(b"\0"):
                processes.add(int(process.name))
                parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                if "slurmstepd" in Path("/proc", parent, "comm").read_text():
                    daemons.add(int(parent))
    assert processes
    for pid in [*daemons, *processes]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
