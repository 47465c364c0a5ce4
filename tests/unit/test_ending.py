"""A process that ends at once: its exit code, what it still says, and who is told before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.resources import ROOT

# What is registered last is called first; an object's last words come only where the process is taken apart.
PROGRAM = """
import atexit, logging, os, sys, threading, time
from orchestrator.ending import ends_at_once, with_code

class Taken:
    def __del__(self, make=os.open, flags=os.O_CREAT):
        make("taken-apart", flags)

ends_at_once()
atexit.register(lambda: open("told", "w").close())
kept = Taken()
kept.itself = kept
logging.basicConfig(level=logging.INFO, stream=sys.stderr)
threading.Thread(target=lambda: (time.sleep(0.3), open("waited", "w").close())).start()
sys.stdout.write("no newline")
logging.info("the last line")
{end}
"""


def run(folder: Path, end: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("code", [0, 1, 69, 75])
def test_what_was_to_be_done_before_the_end_is_done(tmp_path: Path, code: int) -> None:
    ended = run(tmp_path, f"sys.exit(with_code({code}))")
    assert ended.returncode == code
    assert ended.stdout == "no newline"
    assert ended.stderr == "INFO:root:the last line\n"
    assert {path.name for path in tmp_path.iterdir()} == {"told", "waited"}


def test_an_exception_that_nobody_caught_is_told_as_ever(tmp_path: Path) -> None:
    ended = run(tmp_path, "raise ValueError('as ever')")
    assert ended.returncode == 1
    assert ended.stderr.endswith("ValueError: as ever\n")
    assert {path.name for path in tmp_path.iterdir()} == {"told", "waited", "taken-apart"}
