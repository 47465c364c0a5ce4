"""How a job ended is the same from the controller and from accounting, which takes 128 off every exit code."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from orchestrator.backends import slurm_records as records
from orchestrator.backends.base import ENDED, Batch, Handle, Job, JobState
from orchestrator.backends.slurm import SlurmBackend
from orchestrator.engine.failures import classify
from orchestrator.spec.cell import Resources
from tests.lab_slurm import SlurmLab, eventually

RANKS = {"one rank": 1, "two ranks": 2}
# Every signal that ends a process which does nothing about it.
SIGNALS = sorted(
    set(range(1, 32))
    - {int(getattr(signal, f"SIG{n}")) for n in ("CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "WINCH")}
)
CODES = (0, 1, 2, 69, 75, 76, 126, 127)
# What a container's or a shell's own exit code says of the process in it.
STATUSES = (128, 128 + signal.SIGSEGV, 128 + signal.SIGKILL, 128 + signal.SIGTERM, 255)
PROGRAM = f"""
import os, resource, signal, sys
SIGNALS, CODES = {SIGNALS}, {(*CODES, *STATUSES)}
index, rank = int(sys.argv[-1]), int(os.environ.get("RANK", "0"))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
if rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
    if index < len(SIGNALS):
        signal.signal(SIGNALS[index], signal.SIG_DFL) if SIGNALS[index] not in (9,) else None
        os.kill(os.getpid(), SIGNALS[index])
    else:
        os._exit(CODES[index - len(SIGNALS)])
"""


@pytest.fixture(scope="module")
def ended(
    slurm_lab: SlurmLab, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SlurmBackend, dict[str, list[Handle]]]:
    """Jobs of one and of two ranks, one for each signal and exit code, that have ended."""
    folder = tmp_path_factory.mktemp("endings")
    (folder / "program.py").write_text(PROGRAM)
    backend = SlurmBackend(log_directory=folder / "logs", program=(sys.executable, "-S", str(folder / "program.py")))
    handles: dict[str, list[Handle]] = {}
    for name, ranks in RANKS.items():
        resources = Resources(processes=ranks, memory_gb=0.0625, minutes=5)
        batch = f"end{os.getpid()}-{ranks}"
        count = len(SIGNALS) + len(CODES) + len(STATUSES)
        jobs = tuple(Job(f"{batch}-{i}", i, "", resources) for i in range(count))
        handles[name] = list(backend.submit(Batch(batch, "store", jobs)).values())
    every = [handle for own in handles.values() for handle in own]
    eventually(lambda: all(state.phase == ENDED for state in backend.poll(every).values()), 240, pause=0.5)
    return backend, handles


def by_accounting(handles: list[Handle]) -> dict[str, records.Record]:
    """Return accounting's records of the jobs, once it has heard of every end."""
    (job,) = {handle.id.split("_")[0] for handle in handles}
    found: dict[tuple[str, int], records.Record] = {}

    def told() -> bool:
        found.update(records.accounts(timeout=30, jobs=[job]))
        return sum(record.state in records.OVER for record in found.values()) == len(handles)

    eventually(told, 60)
    return {handle.attempt: found[job, int(handle.id.split("_")[1])] for handle in handles}


@pytest.mark.parametrize("ranks", RANKS)
def test_both_sources_tell_every_end_alike(ended: tuple[SlurmBackend, dict[str, list[Handle]]], ranks: str) -> None:
    _, handles = ended
    past = by_accounting(handles[ranks])
    (job,) = {handle.id.split("_")[0] for handle in handles[ranks]}
    queued = {record.task: record for record in records.queue(timeout=30, jobs=[job])}
    for task, handle in enumerate(handles[ranks]):
        live, account = records.ending(queued[task]), records.ending(past[handle.attempt])
        if task < len(SIGNALS):
            assert live == account == (None, SIGNALS[task]), (task, live, account)
            continue
        wanted = (*CODES, *STATUSES)[task - len(SIGNALS)]
        if wanted < 128:
            assert live == account == (wanted, 0)
        elif wanted - 128 in SIGNALS:
            assert live == account == (None, wanted - 128)
        kinds = {classify(JobState(ENDED, *end), None).kind for end in (live, account)}
        assert len(kinds) == 1, (wanted, live, account)


@pytest.mark.faults
def test_what_the_controller_has_forgotten_ended_as_it_said(
    slurm_lab: SlurmLab, ended: tuple[SlurmBackend, dict[str, list[Handle]]]
) -> None:
    backend, handles = ended
    every = [handle for own in handles.values() for handle in own]
    before = {attempt: (state.exit_code, state.signal) for attempt, state in backend.poll(every).items()}
    conf = slurm_lab.directory / "slurm/slurm.conf"
    text = conf.read_text()
    try:
        conf.write_text(text.replace("MinJobAge=300", "MinJobAge=2"))
        slurm_lab.run("scontrol", "reconfigure")
        eventually(lambda: not records.queue(timeout=30, jobs={one.id.split("_")[0] for one in every}), 180, pause=2)
    finally:
        conf.write_text(text)
        slurm_lab.run("scontrol", "reconfigure")
        time.sleep(1)
    after = {attempt: (state.exit_code, state.signal) for attempt, state in backend.poll(every).items()}
    known = {one.attempt for one in every if before[one.attempt] != (255, 0)}  # 255 is 127 to accounting
    assert {attempt: after[attempt] for attempt in known} == {attempt: before[attempt] for attempt in known}
