"""What a launcher or scheduler around this shell left in its environment does not reach a job."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from jobs.node.world import World, own_world
from orchestrator.backends.base import Batch, Job
from orchestrator.backends.local import LocalBackend
from orchestrator.backends.processes import NodeJob, Processes
from orchestrator.spec.cell import Resources
from orchestrator.spec.launchers import outside
from tests.fake_slurm import Scheduler, backend_in, batch_of, scheduler
from tests.lab_slurm import eventually

__all__ = ["scheduler"]

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "ROLE_RANK": "1",
    "MASTER_ADDR": "10.255.255.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "PET_NNODES": "2",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_UNIVERSE_SIZE": "2",
    "PMI_RANK": "1",
    "PMI_SIZE": "2",
    "PMIX_RANK": "1",
    "MPI_LOCALRANKID": "1",
    "MV2_COMM_WORLD_RANK": "1",
    "ACCELERATE_USE_FSDP": "1",
}
SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "3",
    "SLURM_MEM_PER_CPU": "1",
    "SLURM_EXPORT_ENV": "NONE",
    "SBATCH_PARTITION": "nowhere",
    "SBATCH_ACCOUNT": "nobody",
    "SRUN_CPUS_PER_TASK": "7",
    "SQUEUE_PARTITION": "nowhere",
    "SQUEUE_USERS": "nobody",
    "SACCT_FORMAT": "JobID",
    "SALLOC_QOS": "none",
}
OUTER = TORCHRUN | MPI | SLURM
KEPT = {
    "SLURM_CONF": "/etc/slurm.conf",
    "SLURM_CLUSTERS": "far",
    "MY_RANK": "x",
    "NCCL_DEBUG": "INFO",
    "OMPI_MCA_btl": "tcp",
}


@pytest.fixture
def outer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (OUTER | KEPT).items():
        monkeypatch.setenv(name, value)


def test_what_says_nothing_of_a_job_is_kept() -> None:
    assert outside(OUTER | KEPT) == KEPT


def printer(folder: Path) -> tuple[str, ...]:
    """Return a program that writes its environment to a file of the job's number."""
    path = folder / "program.py"
    path.write_text(
        "import json, os, sys\n"
        f"path = os.path.join({str(folder)!r}, 'environment')\n"
        "open(path + '.tmp', 'w').write(json.dumps(dict(os.environ)))\n"
        "os.replace(path + '.tmp', path + os.environ.get('RANK', ''))\n"
    )
    return (sys.executable, "-S", str(path))


def seen(folder: Path, rank: str = "") -> dict[str, str]:
    path = folder / f"environment{rank}"
    eventually(path.exists, 60)
    return dict(json.loads(path.read_text()))


def test_a_job_of_this_machine(outer: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGRID_RUN_DIR", str(tmp_path / "run"))
    backend = LocalBackend(program=printer(tmp_path))
    backend.submit(Batch("b", "store", (Job("b-0", 0, "", Resources()),)))
    environment = seen(tmp_path)
    assert not OUTER.keys() & environment.keys()
    assert KEPT.items() <= environment.items()


@pytest.mark.parametrize("world", [1, 2])
def test_a_job_of_a_ray_node(outer: None, tmp_path: Path, world: int) -> None:
    """Its shell's variables come with the actor, others by `pass_environment: ["*"]`."""
    Processes(
        NodeJob(
            "a", printer(tmp_path), 1, world - 1, world, 1, 0, environment=dict(os.environ), log_directory=str(tmp_path)
        ),
        ("127.0.0.1", 29111),
    )
    environment = seen(tmp_path, "1" if world == 2 else "")
    own = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29111"}
    left = {name: value for name, value in environment.items() if name in OUTER}
    assert left == (own if world == 2 else {})


def test_every_command_of_slurm(outer: None, scheduler: Scheduler, tmp_path: Path) -> None:
    for name in ("sbatch", "squeue", "sacct", "scancel", "scontrol"):
        path = scheduler.directory / name
        path.write_text(path.read_text().replace("#!/bin/sh\n", f'#!/bin/sh\nenv >"{tmp_path}/{name}.env"\n'))
    backend = backend_in(tmp_path)
    handles = list(backend.submit(batch_of(1)).values())
    backend.poll(handles)
    backend.cancel(handles, now=True)
    for name in ("sbatch", "squeue", "sacct", "scancel", "scontrol"):
        got = dict(line.partition("=")[::2] for line in (tmp_path / f"{name}.env").read_text().splitlines())
        assert not OUTER.keys() & got.keys(), name
        assert KEPT.items() <= got.items(), name


def test_a_process_that_is_alone_waits_for_nobody() -> None:
    for outer in (TORCHRUN, MPI, {**SLURM, "MASTER_ADDR": "n0", "MASTER_PORT": "1"}, {"RANK": "x", "WORLD_SIZE": "y"}):
        environment = dict(outer | KEPT)
        assert own_world(environment, 1) == World()
        assert not environment.keys() & (TORCHRUN | MPI).keys()


def test_ranks_of_another_world_are_not_ours() -> None:
    environment = dict(TORCHRUN)
    assert own_world(environment, 4) is None
    assert environment == {}
    ours = dict(TORCHRUN)
    assert own_world(ours, 2) == World(1, 1, 2, "10.255.255.1", 29500)
    assert ours == TORCHRUN
