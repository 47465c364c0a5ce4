"""SLURM's commands as files on the PATH, for unit tests: what they answer, and how they were called."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from orchestrator.backends.base import Batch, Job
from orchestrator.backends.slurm import SlurmBackend
from orchestrator.backends.slurm_script import SlurmSite
from orchestrator.spec.cell import Resources

# What squeue and sacct print above their records.
HEADINGS = {
    "squeue": "ARRAY_JOB_ID|ARRAY_TASK_ID|NAME|STATE|EXIT_CODE|REASON|RESTART_COUNT|TASKS|NODELIST|\n",
    "sacct": "JobID|JobName|State|ExitCode|NodeList|MaxRSS\n",
}


class Scheduler:
    """Fake commands: each prints a file, exits with a code, and writes down how it was called.

    squeue and sacct know no job, and the controller says so, until a test says otherwise.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("sbatch", "squeue", "sacct", "scancel", "scontrol", "sinfo", "srun"):
            path = directory / name
            path.write_text(
                f'#!/bin/sh\necho "{name} $*" >> "{directory}/calls"\ncat "{directory}/{name}.out" 2>/dev/null\n'
                f'cat "{directory}/{name}.err" >&2 2>/dev/null || exit 0\nexit 1\n'
            )
            path.chmod(path.stat().st_mode | stat.S_IEXEC)
        self.says(sbatch="Submitted batch job 7\n", squeue="", sacct="")
        self.fails(scontrol="slurm_load_jobs error: Invalid job id specified")

    def says(self, **answers: str) -> None:
        for name, text in answers.items():
            self.prints(name, HEADINGS.get(name, "") + text)

    def prints(self, name: str, text: str) -> None:
        """Let a command print this alone, without its heading."""
        (self.directory / f"{name}.out").write_text(text)
        (self.directory / f"{name}.err").unlink(missing_ok=True)

    def fails(self, **answers: str) -> None:
        for name, text in answers.items():
            (self.directory / f"{name}.err").write_text(text)

    @property
    def calls(self) -> list[str]:
        path = self.directory / "calls"
        found = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return found


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scheduler:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    return Scheduler(directory)


def backend_in(tmp_path: Path, **settings: object) -> SlurmBackend:
    return SlurmBackend(SlurmSite.of(settings), log_directory=tmp_path / "logs")


def batch_of(count: int, resources: Resources | None = None, name: str = "d-0") -> Batch:
    jobs = tuple(Job(f"{name}-{index}", index, "", resources or Resources()) for index in range(count))
    return Batch(name, "/a store/with 'quotes'", jobs)


def queue_line(
    task: object,
    state: str,
    *,
    job: int = 7,
    name: str = "d-0",
    status: int = 0,
    reason: str = "None",
    restarts: int = 0,
    nodes: str = "n1",
) -> str:
    return f"{job}|{task}|{name}|{state}|{status}|{reason}|{restarts}|1|{nodes}|\n"
