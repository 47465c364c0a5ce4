"""The Ray lab's script when the head does not start: it says so with the head's log, at once."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.lab_ray import LAB


def up(tmp_path: Path, start: str, **words: str) -> subprocess.CompletedProcess[str]:
    """Bring the lab up with a `ray` whose `start` is the shell's `start`, and which never says that a head is well."""
    tool = tmp_path / "ray"
    tool.write_text(f'#!/bin/sh\n[ "$1" = start ] || exit 1\n{start}\n')
    tool.chmod(0o755)
    environment = {**os.environ, "MOEGRID_LAB": str(tmp_path / "lab"), "RAY": str(tool), **words}
    return subprocess.run([LAB, "up"], env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("seconds", ["0", "0.5"])
def test_a_head_that_ends_is_noticed_with_its_last_words(tmp_path: Path, seconds: str) -> None:
    began = time.monotonic()
    answer = up(tmp_path, f"sleep {seconds}; echo no port is free; exit 1")
    assert answer.returncode == 3
    assert "no port is free" in answer.stderr
    assert "point a shell at it" not in answer.stderr
    assert time.monotonic() - began < 10


def test_a_head_that_stays_silent_is_given_up_and_ended(tmp_path: Path) -> None:
    answer = up(tmp_path, "echo waiting for nothing; exec sleep 50", HEAD_SECONDS="2")
    assert answer.returncode == 3
    assert "waiting for nothing" in answer.stderr
    assert not [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"] == ["sleep", "50"]]
