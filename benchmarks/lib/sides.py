"""Two sides of a comparison, each in a process of its own that works only while it is asked to."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.node.numerics import set_threads
from orchestrator.spec.cell import HUGE_PAGES, Resources


def job_environment(threads: int) -> dict[str, str]:
    """Return the environment that our jobs give themselves."""
    before = dict(os.environ)
    set_threads(Resources(cores=threads))
    environment = {**dict([HUGE_PAGES]), **os.environ}
    os.environ.clear()
    os.environ.update(before)
    return environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a side's process is told: which one it is, a folder of its own, and where its answers go."""
    parser.add_argument(
        "--side", choices=["ours", "transformers", "compiled", "padded", "flattened"], help=argparse.SUPPRESS
    )
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=int, help=argparse.SUPPRESS)


def serve(args: argparse.Namespace, first: Any, work: Callable[[int], Any], last: Callable[[], Any]) -> None:
    """In a side's process: answer `first`, `work(number)` for every number that is asked for, then `last()`."""
    with os.fdopen(args.answers, "w", buffering=1) as answers:
        print(json.dumps(first), file=answers)
        for line in sys.stdin:
            print(json.dumps(work(int(line))), file=answers)
        print(json.dumps(last()), file=answers)


class Side:
    """One side's process: the calling script again, with `--side`."""

    def __init__(self, side: str, directory: str, environment: dict[str, str]) -> None:
        theirs, ours = os.pipe()
        self._said = (Path(directory) / f"{side}.log").open("w+")
        words = [sys.executable, *sys.argv, "--side", side, "--directory", directory, "--answers", str(ours)]
        self._process = subprocess.Popen(
            words,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            pass_fds=[ours],
            text=True,
        )
        os.close(ours)
        self._answers = os.fdopen(theirs)
        self.first = self._answer()

    def _answer(self) -> Any:
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            self._said.seek(0)
            sys.exit(f"{self._said.read()[-4000:]}\nthis side ended with exit code {code}")
        return json.loads(line)

    def work(self, number: int) -> Any:
        """Return the side's answer to a number."""
        assert self._process.stdin is not None
        print(number, file=self._process.stdin, flush=True)
        return self._answer()

    def end(self) -> Any:
        """Let the process end; return its last answer."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        last = self._answer()
        self._process.wait()
        return last
