"""The lab's Ray cluster with several logical nodes, and what can be done to it."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.faults import many
from tests.faults.harness import HERE, Lab
from tests.lab_ray import RayLab

CORES = 1  # of each node


@dataclass
class Cluster:
    """A disturbed cluster of `nodes` nodes, the first of which is the head."""

    lab: RayLab
    cluster: Lab
    nodes: int

    def disturb(self, chance: random.Random) -> str:
        """End some jobs as a preemption would, or take a node away for a while."""
        if chance.random() < 0.5:
            jobs = self._jobs()
            for job in chance.sample(jobs, min(2, len(jobs))):
                try:
                    job.send_signal(signal.SIGTERM)
                except psutil.NoSuchProcess:
                    continue
            return "jobs were preempted"
        self._kill(f"node{chance.randint(2, self.nodes)}")
        time.sleep(1.0)
        self.lab.up()
        return "a node was lost"

    def restart_controller(self) -> bool:
        """Kill the head and all nodes: without its control store a cluster is gone, and another one comes up."""
        for node in ("head", *(f"node{number}" for number in range(2, self.nodes + 1))):
            self._kill(node)
        self.lab.up()
        return True

    def _kill(self, node: str) -> None:
        """End a node, which on a machine that is busy may have lost its cluster and be gone by itself."""
        try:
            self.lab.kill_node(node)
        except (psutil.NoSuchProcess, FileNotFoundError):
            return

    def nudge(self) -> None:
        """Ray keeps nothing back."""

    def _jobs(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if str(self.cluster.store_path) in words and any(word.endswith("fake_job.py") for word in words):
                found.append(process)
        return found


def run(lab: RayLab, folder: Path, *, nodes: int, cells: int, seconds: float, every: float = 30.0) -> dict[str, Any]:
    """Bring `cells` cells of 15 stages each to their end on the lab; return what was seen."""
    grid, site = many.write_grid(folder, cells), folder / "many_site.yaml"
    site.write_text((HERE / "ray.yaml").read_text().replace("tick_seconds: 0.3", "tick_seconds: 1"))
    cluster = Lab(folder, site=site)
    try:
        return many.bring_to_the_end(cluster, grid, Cluster(lab, cluster, nodes), seconds=seconds, every=every)
    finally:
        cluster.close()
