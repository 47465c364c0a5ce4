"""The lab's SLURM with many nodes of one core each, and what can be done to it."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import many
from tests.faults.harness import Lab
from tests.lab_slurm import SHAPE, SlurmLab

SITE = """
backend: slurm
qos: low
command_timeout: 20
tick_seconds: 1
lease_seconds: 20
max_jobs: {jobs}
"""


def shape(nodes: int) -> dict[str, str]:
    """Return a cluster in which one job runs on each node."""
    return {**SHAPE, "NODES": str(nodes), "CPUS": "1", "GPUS": "1", "MEMORY_MB": "2000"}


@dataclass
class Cluster:
    """A disturbed cluster of `nodes` nodes."""

    lab: SlurmLab
    nodes: int

    def disturb(self, chance: random.Random) -> str:
        """Preempt some jobs, or take a node away for a while."""
        if chance.random() < 0.5:
            count = chance.randint(1, max(1, self.nodes // 6))
            rush = ["--qos=high", f"--nodes={count}", "--exclusive", "--mem=0", "--time=1", "--output=/dev/null"]
            self.lab.run("sbatch", *rush, "--wrap=sleep 1")
            return "jobs were preempted"
        node = f"n{chance.randint(2, self.nodes)}"
        self.lab.kill(f"slurmd.{node}", signal.SIGKILL)
        self._control("nodename=" + node, "state=down", "reason=lost")
        time.sleep(1.0)
        self.lab.start("slurmd", "-N", node)
        self._control("nodename=" + node, "state=resume")
        return "a node was lost"

    def restart_controller(self) -> bool:
        """Kill the controller; it comes back after some seconds."""
        self.lab.kill("slurmctld", signal.SIGKILL)
        time.sleep(6.0)
        self.lab.start("slurmctld")
        return False

    def nudge(self) -> None:
        """Start requeued jobs at once: SLURM keeps them for two minutes."""
        waiting = ["squeue", "--noheader", "--format=%i %r", "--states=PD"]
        answer = subprocess.run(waiting, check=False, timeout=60, capture_output=True, text=True).stdout
        for line in answer.splitlines():
            job, _, reason = line.partition(" ")
            if reason == "BeginTime":
                self._control(f"jobid={job}", "StartTime=now")

    @staticmethod
    def _control(*words: str) -> None:
        subprocess.run(["scontrol", "update", *words], check=False, timeout=60, capture_output=True)


def run(lab: SlurmLab, folder: Path, *, nodes: int, cells: int, seconds: float, every: float = 8.0) -> dict[str, Any]:
    """Bring `cells` cells of 15 stages each to their end on the lab; return what was seen."""
    grid, site = many.write_grid(folder, cells), folder / "many_site.yaml"
    site.write_text(SITE.format(jobs=nodes + nodes // 2))
    cluster = Lab(folder, {"MOEGRID_SLURM_LOGS": str(folder / "logs")}, site=site)
    try:
        return many.bring_to_the_end(cluster, grid, Cluster(lab, nodes), seconds=seconds, every=every)
    finally:
        cluster.close()
        subprocess.run(["scancel", "--user=root"], check=False, timeout=60)
