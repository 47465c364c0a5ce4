"""CPU seconds of a job from its start to the end of its first step, against an earlier commit of this project.

    python benchmarks/start.py [--against COMMIT] [--rounds 5]

The job is a training stage of one step of a very small model, its commit included: as a process of its own
(`python -m jobs.run`), and forked from a warm worker. The earlier commit is checked out beside and takes turns with
this one, on stores of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.lib.sides import job_environment
from orchestrator.backends.fork_server import Request
from orchestrator.backends.warm import Targets, WarmWorker

ROOT = Path(__file__).resolve().parent.parent

# Runs in the checkout that it prepares a store of: its helpers make what its own version reads.
PREPARE = """
import dataclasses, json, sys
from tests import training
store = training.prepare(sys.argv[1])
training.run_chain(store, [training.init_work()], "init-0")
jobs = []
for number in range(int(sys.argv[2])):
    train = dataclasses.replace(training.TRAIN, steps=1, lr=1e-3 * (1 + number))
    jobs.append(training.submit(store, training.segments([("", 0, 1)], train), f"batch{number}-0", ttl=86400.0))
print(json.dumps(jobs))
"""


class Side:
    """One version of the project with a store of its own and as many jobs as there are rounds."""

    def __init__(self, root: Path, store: str, rounds: int) -> None:
        self._root = root
        self._environment = {**job_environment(1), "PYTHONPATH": str(root)}
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)  # modules are compiled once, as where it is not set
        made = subprocess.run(
            [sys.executable, "-c", PREPARE, store, str(rounds)],
            cwd=root,
            env=self._environment,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        self._jobs: list[list[str]] = json.loads(made.stdout.splitlines()[-1])

    def run(self, number: int) -> float:
        """Run a job; return its CPU seconds."""
        job = subprocess.Popen(
            self._jobs[number],
            cwd=self._root,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        assert job.stderr is not None
        said = job.stderr.read()
        _, status, usage = os.wait4(job.pid, 0)
        job.returncode = os.waitstatus_to_exitcode(status)
        if job.returncode:
            sys.exit(f"{said.decode()[-4000:]}\nthe job ended with exit code {job.returncode}")
        return usage.ru_utime + usage.ru_stime


class WarmSide(Side):
    """Jobs of this version, forked from a worker that stands ready."""

    def __init__(self, root: Path, store: str, rounds: int) -> None:
        super().__init__(root, store, rounds)
        self._folder = Path(f"{store}-records")
        self._folder.mkdir()
        self._worker = WarmWorker(Targets(), self._environment, self._folder)
        while not self._worker.ready:
            if self._worker.ended:
                sys.exit((self._folder / "worker.log").read_text())
            time.sleep(0.05)

    def run(self, number: int) -> float:
        """Let a job be forked; return its CPU seconds."""
        pid, end, log = (str(self._folder / f"{number}.{kind}") for kind in ("pid", "exit", "log"))
        self._worker.start(Request(pid, end, log, tuple(self._jobs[number][3:])))
        while not Path(end).exists():
            time.sleep(0.02)
        ended = json.loads(Path(end).read_text())
        if ended["code"] != 0:
            sys.exit(f"{Path(log).read_text()[-4000:]}\nthe job ended as {ended}")
        return float(ended["cpu"])


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """Give a commit of this repository in a folder, for as long as the block lasts."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", folder, commit], cwd=ROOT, check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", folder], cwd=ROOT, check=True)


def main() -> None:
    """Print both sides' seconds and the ratio of their medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default="8955992", metavar="COMMIT")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, checked_out(args.against, Path(folder) / "earlier") as earlier:
        # One round more than is counted: the first one reads files that the machine has not in memory.
        rounds = args.rounds + 1
        sides = {
            args.against: Side(earlier, f"{folder}/before", rounds),
            "fresh process": Side(ROOT, f"{folder}/fresh", rounds),
            "warm worker": WarmSide(ROOT, f"{folder}/warm", rounds),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name, side in sides.items():
                took = side.run(number)
                if number:
                    seconds[name].append(took)
    for name, values in seconds.items():
        print(f"{name:14s} {statistics.median(values):6.2f} CPU s  ({', '.join(f'{v:.2f}' for v in values)})")
    before, *ours = (statistics.median(values) for values in seconds.values())
    for name, now in zip(list(sides)[1:], ours, strict=True):
        print(f"{name}: {now / before:.2f}x the CPU of {args.against}")


if __name__ == "__main__":
    main()
