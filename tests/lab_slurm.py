"""A private SLURM cluster for the tests: infra/slurm/lab.sh, brought up once a run in a directory of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.labs import lab_missing

LAB = Path(__file__).parents[1] / "infra/slurm/lab.sh"
TOOLS = ("slurmctld", "slurmd", "slurmdbd", "sbatch", "munged", "mariadbd", "unshare")
SHAPE = {"NODES": "4", "GPUS": "2", "CPUS": "8", "MEMORY_MB": "16000"}


@dataclass(frozen=True)
class SlurmLab:
    """The running cluster; `directory` is shared by all its nodes."""

    directory: Path
    environment: dict[str, str]

    def run(self, *command: str, timeout: float = 60) -> str:
        """Run a SLURM command and return its output."""
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        assert answer.returncode == 0, f"{command}: {answer.stderr}"
        return answer.stdout.strip()

    def pid(self, daemon: str) -> int:
        """Return the process id of `slurmctld` or `slurmd.n1`."""
        return int((self.directory / "slurm" / f"{daemon}.pid").read_text())

    def kill(self, daemon: str, number: int) -> None:
        """Signal a daemon and wait until it is gone (a zombie that nobody waits for counts as gone)."""
        pid = self.pid(daemon)
        os.kill(pid, number)
        status = Path(f"/proc/{pid}/stat")
        eventually(lambda: not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z")

    def start(self, *daemon: str) -> None:
        """Start a daemon as the lab does, in a namespace whose host name is localhost."""
        command = ["unshare", "--uts", "--", "sh", "-c", 'hostname localhost && exec "$@"', "daemon", *daemon]
        subprocess.run(command, env=self.environment, check=True, timeout=30, capture_output=True)


@pytest.fixture(scope="session")
def slurm_lab() -> Iterator[SlurmLab]:
    """A cluster of four nodes with two fake GPUs each; this process's SLURM commands talk to it."""
    yield from lab_of(SHAPE)


def lab_of(shape: dict[str, str]) -> Iterator[SlurmLab]:
    """Bring up a cluster of this shape, yield it, and take it down."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing or os.geteuid() != 0:
        lab_missing("SLURM", f"{', '.join(missing)} not installed" if missing else "it needs root")
    directory = Path(tempfile.mkdtemp(prefix="moegrid-slurm-"))
    environment = {**os.environ, **shape, "MOEGRID_LAB": str(directory)}
    directory.chmod(0o755)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = environment["SLURM_CONF"] = str(directory / "slurm/slurm.conf")
    environment["MOEGRID_SLURM_LAB"] = str(directory / "slurm")
    try:
        answer = subprocess.run(
            [str(LAB), "up"], env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        if answer.returncode:
            lab_missing("SLURM", answer.stderr.strip())
        yield SlurmLab(directory, environment)
    finally:
        subprocess.run([str(LAB), "down", "--wipe"], env=environment, capture_output=True, timeout=60, check=False)
        shutil.rmtree(directory, ignore_errors=True)
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before


def eventually(condition: Callable[[], object], seconds: float = 120.0, pause: float = 0.2) -> None:
    """Wait until `condition()` is true; fail the test after `seconds`."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {value!r}"
        time.sleep(pause)
