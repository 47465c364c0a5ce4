"""A small grid with fake stages, drivers that can be killed anywhere, and what must hold afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.store import Store

HERE = Path(__file__).parent
SITE = HERE / "site.yaml"
GRID = "quickstart"
ONLY = ("freeze=none", "freeze=none->router")
TIMEOUT = 300.0


def graph() -> StageGraph:
    """Return the stage graph that the harness runs."""
    return build_graph(load_grid(GRID, only=ONLY))


@dataclass
class Lab:
    """One store and what runs on it."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    site: Path = SITE
    drivers: list[subprocess.Popen[str]] = field(default_factory=list)
    url: str = ""  # of a store elsewhere than in `folder`

    @property
    def store_path(self) -> Path:
        return self.folder / "store"

    @property
    def log(self) -> Path:
        return self.folder / "executions.jsonl"

    def order(self, *orders: dict[str, Any]) -> None:
        """Make stages misbehave: see `fake_stages.misbehave`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "orders.json").write_text(json.dumps(orders))

    def start(self, *words: str, grid: str = GRID, only: tuple[str, ...] = ONLY, **extra: str) -> subprocess.Popen[str]:
        """Start a driver (`run`, unless `words` name another command); keyword arguments are its environment."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = words or ("run",)
        gc = ["--delete", "--grace", "0"] if command[0] == "gc" else [grid]
        arguments = [sys.executable, str(HERE / "driver.py"), command[0], *gc, *command[1:]]
        arguments += [part for value in only for part in ("--only", value)]
        arguments += ["--store", self.url or str(self.store_path), "--tracking", "none"]
        if command[0] in ("run", "resume", "tick"):
            arguments += ["--site", str(self.site), "--no-report"]
        environment = {
            **os.environ,
            "MOEGRID_RUN_DIR": str(self.folder / "run"),
            "FAKE_LOG": str(self.log),
            "FAKE_ORDERS": str(self.folder / "orders.json"),
            "PYTHONPATH": "",
            **self.environment,
            **extra,
        }
        environment.pop("MOEGRID_CORES", None)
        driver = subprocess.Popen(
            arguments,
            env=environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.drivers.append(driver)
        return driver

    def drive(self, *words: str, **extra: Any) -> tuple[int, str]:
        """Run a driver to its end; return its exit code (negative: signal) and what it said."""
        driver = self.start(*words, **extra)
        said = driver.communicate(timeout=TIMEOUT)[0]
        return driver.returncode, said

    def executions(self) -> list[dict[str, Any]]:
        """Return what passed the gate, in order."""
        if not self.log.exists():
            return []
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def job_pids(self) -> list[int]:
        """Return the processes of this lab's jobs that live now."""
        pids = []
        for path in (self.folder / "run" / "jobs").glob("*.pid"):
            pid = int(path.read_text().split()[0])
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if b"fake_job" in words:
                pids.append(pid)
        return pids

    def wait_for(self, condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
        """Return the first true value of `condition`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := condition():
                return value
            time.sleep(0.02)
        raise AssertionError(f"waited {seconds} s for {what}")

    def store(self) -> Store:
        """Open the lab's store."""
        return Store.open(self.url or str(self.store_path))

    def results(self) -> dict[str, tuple[str, tuple[tuple[str, float], ...]]]:
        """Return key -> (digest of its bits, metrics) of the grid's artifacts."""
        manifests = self.store().artifacts.many(graph().stages)
        return {key: (m.digest, tuple(sorted(m.metrics.items()))) for key, m in manifests.items()}

    def close(self) -> None:
        """End every process of this lab."""
        for driver in self.drivers:
            if driver.poll() is None:
                driver.kill()
                driver.wait()
            if driver.stdout is not None:
                driver.stdout.close()
        for pid in self.job_pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def trained(lab: Lab) -> list[dict[str, Any]]:
    """Return the executions of the pretraining stage."""
    pretrain = next(key for key, stage in graph().stages.items() if stage.phase == "pretrain")
    return [line for line in lab.executions() if line["stage"] == pretrain]


def assert_sound(lab: Lab, reference: dict[str, Any], *, once: bool = True) -> None:
    """Nothing lost, nothing different, nothing damaged; and with `once` nothing executed twice."""
    assert lab.results() == reference
    store = lab.store()
    for key in graph().stages:
        store.artifacts.verify(key)
    if once:
        stages = [line["stage"] for line in lab.executions()]
        doubled = {stage for stage in stages if stages.count(stage) > 1}
        assert not doubled, f"executed twice: {[graph().stages[stage].label for stage in doubled]}"
