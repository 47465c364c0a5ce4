"""A Ray cluster of two nodes for the tests: infra/ray/lab.sh, brought up once a run in a directory of its own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.labs import lab_missing

LAB = Path(__file__).parents[1] / "infra/ray/lab.sh"
NAMES = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True)
class RayLab:
    """The running cluster."""

    directory: Path
    environment: dict[str, str]

    def kill_node(self, name: str) -> None:
        """End the raylet of a node and everything it started, as a power cut would."""
        if name == "head":
            import ray

            ray.shutdown()  # a process that is connected to a raylet ends with it
        top = psutil.Process(int((self.directory / "ray" / f"{name}.pid").read_text().split()[0]))
        processes = [top, *top.children(recursive=True)]
        for process in processes:
            process.suspend()
        for process in processes:
            process.send_signal(signal.SIGKILL)

    def up(self) -> None:
        """Start what is not running, and point this process's environment at it."""
        answer = subprocess.run(
            [str(LAB), "up"], env=self.environment, capture_output=True, text=True, timeout=300, check=False
        )
        if answer.returncode:
            pytest.fail(f"the Ray lab does not come up: {answer.stderr.strip()}")  # Ray is installed: it must
        named = (self.directory / "ray/env").read_text().split()[1:]
        os.environ.update(dict(item.split("=", 1) for item in named))


@pytest.fixture(scope="session")
def ray_lab() -> Iterator[RayLab]:
    """A cluster of two nodes with four logical cores each; this process's Ray connects to it."""
    yield from lab_of(2, 4)


def lab_of(nodes: int, cores: int) -> Iterator[RayLab]:
    """Bring up a cluster of so many nodes with so many logical cores each, yield it, and take it down."""
    if importlib.util.find_spec("ray") is None:
        lab_missing("Ray", "the package ray is not installed")
    directory = Path(tempfile.mkdtemp(prefix="moegrid-ray-"))
    tool = str(Path(sys.executable).with_name("ray"))
    environment = {**os.environ, "MOEGRID_LAB": str(directory), "NODES": str(nodes), "CPUS": str(cores), "RAY": tool}
    before = {name: os.environ.get(name) for name in NAMES}
    try:
        lab = RayLab(directory, environment)
        lab.up()
        yield lab
    finally:
        import ray

        ray.shutdown()
        subprocess.run([str(LAB), "down", "--wipe"], env=environment, capture_output=True, timeout=60, check=False)
        shutil.rmtree(directory, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
