"""Two thousand stages on a cluster that is disturbed: what they must come to, and what was done twice."""

from __future__ import annotations

import hashlib
import json
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Protocol

from orchestrator.grid.load import load_grid
from orchestrator.plan.graph import StageGraph, build_graph
from orchestrator.spec.work import TrainWork
from tests.faults.harness import Lab

GRID = """
name: many
description: many small stages
base: finetune
factors: {{router_lr_ratio: [{ratios}], seed: [{seeds}]}}
evaluate: [lm, reasoning]
at: [0.2, 0.4, 0.6, 0.8, 1.0]
set: {{execution: {{resources: {{{resources}}}}}}}
"""
PHASES = ("prepare", "pretrain", "finetune", "evaluate")
RATIOS = 8


def write_grid(folder: Path, cells: int, *, cores: int = 1, memory_gb: float = 0.2) -> Path:
    """Write a grid of `cells` cells of 15 stages each, whose jobs ask for little."""
    ratios = ", ".join(f"{0.1 * number:.1f}" for number in range(1, min(RATIOS, cells) + 1))
    seeds = ", ".join(map(str, range(max(1, cells // RATIOS))))
    resources = ", ".join(f"{phase}: {{cores: {cores}, memory_gb: {memory_gb}}}" for phase in PHASES)
    path = folder / "many.yaml"
    path.write_text(GRID.format(ratios=ratios, seeds=seeds, resources=resources))
    return path


def graph_of(path: Path) -> StageGraph:
    """Return the stages of a grid file."""
    return build_graph(load_grid(str(path)))


def expected(graph: StageGraph) -> dict[str, str]:
    """Return key -> sha256 of the bytes that `fake_stages` commits, computed here from the graph alone."""
    whole: dict[str, bytes] = {}
    for key, stage in graph.stages.items():
        work = stage.work
        if isinstance(work, TrainWork):
            state = whole[work.parent][:32]
            link = hashlib.sha256(whole[work.conditions.tokens] + work.conditions.digest().encode()).digest()
            for step in range(work.start + 1, work.stop + 1):
                state = hashlib.sha256(state + link + step.to_bytes(4)).digest()
            whole[key] = state * 64
        else:
            seen = hashlib.sha256(key.encode())
            for parent in work.parents.values():
                seen.update(whole[parent])
            whole[key] = seen.digest() * 64
    return {key: hashlib.sha256(data).hexdigest() for key, data in whole.items()}


def assert_whole(cluster: Lab, graph: StageGraph) -> None:
    """Every stage has its artifact with the right bits, made once; none was begun again after it was there."""
    manifests = cluster.store().artifacts.many(graph.stages)
    found = {
        key: next(blob.sha256 for blob in manifest.blobs if blob.name.endswith(".bin"))
        for key, manifest in manifests.items()
    }
    assert found == expected(graph)
    assert {manifest.generation for manifest in manifests.values()} == {0}
    late = [
        graph.stages[line["stage"]].label
        for line in cluster.executions()
        if line["time"] > manifests[line["stage"]].created + 1.0
    ]
    assert not late, f"begun again after they were done: {late[:5]}"
    tokens: dict[str, list[int]] = {}
    for line in cluster.executions():
        tokens.setdefault(line["stage"], []).append(line["token"])
    assert all(len(set(own)) == len(own) for own in tokens.values()), "two processes held one lease"


def ticks(path: Path) -> list[dict[str, Any]]:
    """Return what the driver wrote down of each tick: seconds, stages at work, calls by name."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class Disturbed(Protocol):
    """A cluster that can be disturbed."""

    def disturb(self, chance: random.Random) -> str:
        """Preempt jobs or take a node away; return what was done."""
        ...

    def restart_controller(self) -> bool:
        """End what schedules, and start it again; return whether a driver ends with it."""
        ...

    def nudge(self) -> None:
        """Let jobs go on now that the scheduler would keep back for a while."""
        ...


def bring_to_the_end(
    cluster: Lab, grid: Path, site: Disturbed, *, seconds: float, every: float = 8.0
) -> dict[str, Any]:
    """Run the grid while the site is disturbed every few seconds; return what was seen.

    Once the controller is restarted and once the driver is killed, at a quarter and at half of the stages. Raises
    AssertionError when the run does not end, or something was lost or done twice.
    """
    graph, log = graph_of(grid), cluster.folder / "ticks.jsonl"
    words = {"TICK_LOG": str(log), "FAKE_STEP_SECONDS": "0.02", "FAKE_HURRY": "2"}
    chance, done = random.Random(7), list[str]()
    to_come: dict[str, float] = {"the controller was restarted": 0.25, "the driver was killed": 0.5}
    began, said = time.monotonic(), list[str]()

    def start() -> subprocess.Popen[str]:
        """Start a driver whose words are read as they come: a full pipe would stop it."""
        made = cluster.start(grid=str(grid), only=(), **words)
        assert made.stdout is not None
        threading.Thread(target=said.extend, args=(iter(made.stdout.readline, ""),), daemon=True).start()
        return made

    driver = start()
    while driver.poll() is None and time.monotonic() - began < seconds:
        time.sleep(every)
        begun = len(cluster.executions())
        if not begun:
            continue
        done.append(site.disturb(chance))
        for what in [what for what, share in to_come.items() if begun > share * len(graph.stages)]:
            del to_come[what]
            done.append(what)
            gone = site.restart_controller() if what == "the controller was restarted" else True
            if gone:
                if driver.poll() is None:
                    driver.send_signal(signal.SIGKILL)
                driver.wait()
                driver = start()
        site.nudge()
    assert driver.poll() is not None, f"not within {seconds} s: {summary(cluster, graph, ticks(log))}, {done}"
    assert driver.returncode == 0, "".join(said[-60:])
    assert not to_come, "it ended before it was disturbed"
    assert_whole(cluster, graph)
    return {
        **summary(cluster, graph, ticks(log)),
        "seconds": round(time.monotonic() - began),
        "disturbed": dict(Counter(" ".join(what.split()[:3]) for what in done)),
    }


def summary(cluster: Lab, graph: StageGraph, told: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what a run on a disturbed cluster looked like."""
    executed = Counter(line["stage"] for line in cluster.executions())
    failures = cluster.store().objects.list("failures")
    names = sorted({name for tick in told for name in tick["calls"]})
    halves = (told[: len(told) // 2], told[len(told) // 2 :])
    return {
        "stages": len(graph.stages),
        "done": len(graph.stages.keys() & cluster.store().artifacts.keys()),
        "executions": sum(executed.values()),
        "stages begun more than once": sum(count > 1 for count in executed.values()),
        "failures written down": sum(entry.path.endswith(".json") for entry in failures),
        "ticks": len(told),
        "most at work": max((tick["busy"] for tick in told), default=0),
        "most calls in a tick": {name: max(tick["calls"].get(name, 0) for tick in told) for name in names},
        "mean CPU s a tick, first and second half": [
            round(sum(tick["cpu"] for tick in half) / max(1, len(half)), 4) for half in halves
        ],
    }
