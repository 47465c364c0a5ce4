"""The SLURM backend against commands that are files on the PATH: what is asked, how often, and how answers are read."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.backends import slurm_records as records
from orchestrator.backends.base import (
    ABSENT,
    ELSEWHERE,
    ENDED,
    QUEUED,
    RUNNING,
    Batch,
    Handle,
    Job,
    JobState,
)
from orchestrator.backends.slurm_records import REST, Record
from orchestrator.backends.slurm_script import RANK_PATIENCE, SlurmSite, ranges
from orchestrator.errors import MoegridError
from orchestrator.resources import ROOT
from orchestrator.spec.cell import Resources
from tests.fake_slurm import Scheduler, backend_in, batch_of, queue_line, scheduler

__all__ = ["scheduler"]


def test_the_logging_of_the_process_stays_as_it_is() -> None:
    code = """
import io, logging, os, sys
closed = []
handler = logging.StreamHandler(io.StringIO())
handler.close = lambda: closed.append(1)
from orchestrator.backends.slurm_script import load_submitit
load_submitit()
assert "submitit" in sys.modules and "SUBMITIT_LOG_LEVEL" not in os.environ
sys.exit(len(closed))
"""
    clean = {name: value for name, value in os.environ.items() if name != "SUBMITIT_LOG_LEVEL"}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean, timeout=60, check=False).returncode == 0


def test_a_tick_costs_two_calls_however_many_jobs(scheduler: Scheduler, tmp_path: Path) -> None:
    backend = backend_in(tmp_path)
    for count in (3, 1000):
        handles = list(backend.submit(batch_of(count)).values())
        assert [call.split()[0] for call in scheduler.calls] == ["sbatch"]
        live = "".join(queue_line(task, "RUNNING") for task in range(0, count, 2))
        scheduler.says(squeue=live, sacct="".join(f"7_{task}|d-0|COMPLETED|0:0|n1|\n" for task in range(count)))
        states = backend.poll(handles)
        assert [call.split()[0] for call in scheduler.calls] == ["squeue", "sacct"]
        assert [state.phase for state in states.values()] == [
            phase for _, phase in zip(range(count), itertools.cycle((RUNNING, ENDED)), strict=False)
        ]
    scheduler.says(squeue="".join(queue_line(task, "RUNNING") for task in range(1000)))
    backend.poll(handles)
    assert [call.split()[0] for call in scheduler.calls] == ["squeue"]


def test_equal_resources_share_an_array_and_large_batches_are_cut(scheduler: Scheduler, tmp_path: Path) -> None:
    backend = backend_in(tmp_path, max_array=4)
    jobs = tuple(Job(f"d-0-{i}", i, "", Resources(cores=1 + (i == 2))) for i in range(6))
    handles = backend.submit(Batch("d-0", "store", jobs))
    scripts = [(tmp_path / f"logs/d-0/submission-{number}.sh").read_text() for number in range(3)]
    found = [[line for line in script.splitlines() if "--array" in line or "job-name" in line] for script in scripts]
    assert found == [
        ["#SBATCH --array=0-1,3", "#SBATCH --job-name=d-0"],
        ["#SBATCH --array=2", "#SBATCH --job-name=d-0"],
        ["#SBATCH --array=0-1", "#SBATCH --job-name=d-0+1"],
    ]
    assert "job=$((SLURM_ARRAY_TASK_ID + 4))" in scripts[2]
    assert sorted(handles) == [f"d-0-{i}" for i in range(6)]
    scheduler.says(squeue=queue_line(1, "PENDING", name="d-0+1") + queue_line(3, "RUNNING"))
    assert {a: h.id for a, h in backend.find("d-0").items()} == {"d-0-5": "7_1", "d-0-3": "7_3"}


def test_the_script_holds_the_command_and_the_site_and_no_secret(
    scheduler: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-secret")
    backend = backend_in(
        tmp_path,
        partition="gpu",
        account="me",
        qos="low",
        constraint="a100&80gb",
        gpu_type="a100",
        modules=["cuda/12 8"],
        proxy="http://proxy:3128",
        scratch="/scratch/$SLURM_JOB_ID",
        container="apptainer exec --nv image.sif",
        python="/opt/python",
        options={"mail-type": "FAIL", "exclusive": True},
        setup=["ulimit -n 65536"],
    )
    resources = Resources(nodes=2, processes=4, cores=3, gpus=4, memory_gb=1.5, minutes=60)
    backend.submit(batch_of(1, resources))
    script = (tmp_path / "logs/d-0/submission-0.sh").read_text()
    for line in (
        "#SBATCH --partition=gpu",
        "#SBATCH --account=me",
        "#SBATCH --qos=low",
        "#SBATCH --constraint='a100&80gb'",
        "#SBATCH --gpus-per-node=a100:4",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --cpus-per-task=3",
        "#SBATCH --mem=1536M",
        "#SBATCH --time=60",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --requeue",
        "#SBATCH --mail-type=FAIL",
        "#SBATCH --exclusive",
        "module load 'cuda/12 8'",
        'export TMPDIR="/scratch/$SLURM_JOB_ID"',
        "export OMP_NUM_THREADS=3",
        "export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}",
        "ulimit -n 65536",
    ):
        assert line in script.splitlines()
    assert "hidden-secret" not in script
    command = (
        f'srun --unbuffered --wait={RANK_PATIENCE} --cpus-per-task=3 /bin/sh -c "$rank" rank apptainer exec --nv '
        "image.sif /opt/python -m jobs.run --store '/a store/with '\"'\"'quotes'\"'\"'' --batch d-0 --job \"$job\""
    )
    assert command in script


@pytest.mark.parametrize(
    "queued, account, expected",
    [
        (queue_line(0, "PENDING", reason="Resources", nodes=""), "", JobState(QUEUED, reason="Resources")),
        (queue_line(0, "PENDING", reason="JobHeldAdmin", nodes=""), "", JobState(QUEUED, reason="JobHeldAdmin")),
        (queue_line(0, "RUNNING"), "", JobState(RUNNING, host="n1")),
        (queue_line(0, "COMPLETING"), "", JobState(RUNNING, host="n1")),
        (queue_line(0, "COMPLETED"), "", JobState(ENDED, 0, host="n1")),
        (queue_line(0, "FAILED", status=75 << 8), "", JobState(ENDED, 75, reason="FAILED", host="n1")),
        (queue_line(0, "FAILED", status=9), "", JobState(ENDED, None, signal.SIGKILL, "FAILED", "n1")),
        (queue_line(0, "FAILED", status=137 << 8), "", JobState(ENDED, None, signal.SIGKILL, "FAILED", "n1")),
        (queue_line(0, "FAILED", status=53), "", JobState(ENDED, 1, 0, "FAILED", "n1")),
        (queue_line("N/A", "CANCELLED"), "", JobState(ENDED, None, 0, "CANCELLED", "n1")),
        # accounting speaks for what the controller has forgotten, its newest start last
        ("", "7_0|d-0|NODE_FAIL|0:0|n1|\n", JobState(ENDED, None, 0, "NODE_FAIL", "n1")),
        ("", "7_0|d-0|CANCELLED by 0|0:15|n1|\n", JobState(ENDED, None, signal.SIGTERM, "CANCELLED", "n1")),
        # sacct takes 128 off an exit code: 137, 139, 143, 128, 255; what programs end with stays
        ("", "7_0|d-0|FAILED|9:0|n1|\n", JobState(ENDED, None, signal.SIGKILL, "FAILED", "n1")),
        ("", "7_0|d-0|FAILED|11:0|n1|\n", JobState(ENDED, None, signal.SIGSEGV, "FAILED", "n1")),
        ("", "7_0|d-0|FAILED|15:0|n1|\n", JobState(ENDED, None, signal.SIGTERM, "FAILED", "n1")),
        ("", "7_0|d-0|FAILED|0:0|n1|\n", JobState(ENDED, 128, 0, "FAILED", "n1")),
        ("", "7_0|d-0|FAILED|127:0|n1|\n", JobState(ENDED, 127, 0, "FAILED", "n1")),
        ("", "7_0|d-0|FAILED|1:0|n1|\n", JobState(ENDED, 1, 0, "FAILED", "n1")),
        ("", "7_0|d-0|FAILED|1:0|n1|\n7_0.batch|batch|CANCELLED|0:1|n1|\n",
         JobState(ENDED, None, signal.SIGHUP, "FAILED", "n1")),
        ("", "7_0|d-0|FAILED|75:0|n1|\n", JobState(ENDED, 75, 0, "FAILED", "n1")),
        ("", "7_0|d-0|FAILED|0:9|n1|\n", JobState(ENDED, None, signal.SIGKILL, "FAILED", "n1")),
        ("", "7_0|d-0|TIMEOUT|0:0|n1|\n7_0.batch|batch|CANCELLED|0:15|n1|1048576K\n",
         JobState(ENDED, None, 0, "TIMEOUT", "n1", 1.0)),
        ("", "7_0|d-0|PREEMPTED|0:0|n1|\n7_0|d-0|COMPLETED|0:0|n2|\n", JobState(ENDED, 0, host="n2")),
        ("", "7_[0-9]|d-0|CANCELLED|0:0|None|\n", JobState(ENDED, None, 0, "CANCELLED", "None")),
        # a requeued job whose first start still holds the lease: the node that died is the reason
        (queue_line(0, "FAILED", status=76 << 8, restarts=1), "", JobState(ENDED, 76, 0, "NODE_FAIL", "n1")),
        (queue_line(0, "FAILED", status=76 << 8), "", JobState(ENDED, 76, 0, "FAILED", "n1")),
        # accounting lags: the controller has dropped the job, the database has not heard of its end
        ("", "7_0|d-0|RUNNING|0:0|n1|\n", JobState(RUNNING, host="n1")),
        ("", "", JobState(ABSENT)),
        ("", "7_[1-9]|d-0|PENDING|0:0|None|\n", JobState(ABSENT)),
        # the same job id, another job
        (queue_line(0, "RUNNING", name="other"), "7_0|other|RUNNING|0:0|n1|\n", JobState(ABSENT)),
    ],
)  # fmt: skip
def test_states(scheduler: Scheduler, tmp_path: Path, queued: str, account: str, expected: JobState) -> None:
    backend = backend_in(tmp_path)
    handles = backend.submit(batch_of(1))
    scheduler.says(squeue=queued, sacct=account)
    assert backend.poll(list(handles.values())) == {"d-0-0": expected}


def test_a_record_that_accounting_never_closes_is_given_up(
    scheduler: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backend_in(tmp_path)
    handles = list(backend.submit(batch_of(1)).values())
    scheduler.says(squeue="", sacct="7_0|d-0|RUNNING|0:0|n1|\n")
    assert backend.poll(handles)["d-0-0"].phase == RUNNING
    monkeypatch.setattr("orchestrator.backends.slurm.ACCOUNTING_LAG", 0.0)
    assert backend.poll(handles)["d-0-0"] == JobState(ENDED, host="n1")


def test_requeued_jobs_are_started_with_one_call_after_a_rest(
    scheduler: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backend_in(tmp_path)
    handles = list(backend.submit(batch_of(3)).values())
    lines = [queue_line(task, "PENDING", reason="BeginTime", restarts=task) for task in range(3)]
    scheduler.says(squeue="".join(lines))
    assert {state.phase for state in backend.poll(handles).values()} == {QUEUED}
    assert not any(call.startswith("scontrol") for call in scheduler.calls)
    monkeypatch.setattr("orchestrator.backends.slurm.REQUEUE_SECONDS", 0.0)
    backend.poll(handles)
    assert [call for call in scheduler.calls if call.startswith("scontrol")] == [
        "scontrol update JobId=7_1,7_2 StartTime=now"
    ]


def test_cancelling_signals_what_runs_and_drops_what_waits(scheduler: Scheduler, tmp_path: Path) -> None:
    backend = backend_in(tmp_path)
    handles = list(backend.submit(batch_of(6)).values())
    scheduler.says(squeue="".join(queue_line(t, "RUNNING" if t < 3 else "PENDING") for t in range(6)))
    backend.cancel(handles, now=False)
    assert [call for call in scheduler.calls if call.startswith("scancel")] == [
        "scancel --quiet 7_[3-5]",
        "scancel --quiet --batch --signal=TERM 7_[0-2]",
    ]
    backend.cancel(handles, now=True)
    assert [call for call in scheduler.calls if call.startswith("scancel")] == ["scancel --quiet 7_[0-5]"]


def test_a_job_that_no_node_can_take_fails_alone(scheduler: Scheduler, tmp_path: Path) -> None:
    backend = backend_in(tmp_path)
    taken = backend.submit(batch_of(1))
    scheduler.fails(sbatch="sbatch: error: Memory specification can not be satisfied")
    refused = backend.submit(batch_of(1, Resources(memory_gb=9999), name="d-1"))
    scheduler.says(squeue=queue_line(0, "RUNNING"))
    states = backend.poll([*taken.values(), *refused.values()])
    assert states == {"d-0-0": JobState(RUNNING, host="n1"), "d-1-0": JobState(ENDED, 1, reason="REFUSED")}
    log = backend.log(refused["d-1-0"])
    assert log is not None
    assert "Memory specification" in log.read_text()
    backend.cancel(list(refused.values()), now=True)


def test_handles_of_another_site_are_elsewhere(scheduler: Scheduler, tmp_path: Path) -> None:
    backend = backend_in(tmp_path)
    local = Handle("x-0", "x", "4711", {"host": "here", "pid": 4711})
    assert backend.poll([local]) == {"x-0": JobState(ELSEWHERE)}
    backend.cancel([local], now=True)
    assert scheduler.calls == []


def test_a_kill_for_memory_needs_evidence(scheduler: Scheduler, tmp_path: Path) -> None:
    backend = backend_in(tmp_path)
    handles = backend.submit(batch_of(1))
    scheduler.says(squeue=queue_line(0, "FAILED", status=9))
    log = tmp_path / "logs/d-0/job-0.log"
    for line, reason in (
        ("killed", "FAILED"),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in StepId=7.batch.", "OUT_OF_MEMORY"),
        ("slurmstepd: error: StepId=7.batch exceeded memory limit (309 > 128), being killed", "OUT_OF_MEMORY"),
    ):
        log.write_text(f"{line}\n")
        assert backend.poll(list(handles.values()))["d-0-0"].reason == reason


def test_lists_of_tasks() -> None:
    assert ranges([7, 0, 1, 2, 9, 10]) == "0-2,7,9-10"
    assert list(records.expand("[0-2,7,9-10%3]")) == [0, 1, 2, 7, 9, 10]
    assert list(records.expand("12")) == [12]
    assert list(records.expand("N/A")) == [REST]
    assert list(records.expand("[1,3,5,...]")) == [REST, 1, 3, 5]
    assert records.gibibytes("1048576K") == 1.0
    assert records.gibibytes("") == 0.0
    assert records.ending(Record("7", 0, "d", "COMPLETED")) == (0, 0)


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(MoegridError) as refused:
        SlurmSite.of({"partiton": "gpu"})
    assert refused.value.hint == "did you mean 'partition'?"
