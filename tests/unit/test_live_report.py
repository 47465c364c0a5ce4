"""The report of a running grid: written when something new is there, never twice at a time, ended with the run."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.commands import live_report as live

SLOW = "import sys, time; open(sys.argv[1], 'a').write('x'); time.sleep(float(sys.argv[2]))"


def writing(report: live.LiveReport) -> bool:
    """Return whether a report is being written now."""
    return report._process is not None and report._process.poll() is None


def tick(*finished: str) -> Any:
    return SimpleNamespace(finished=finished)


@pytest.fixture
def graph() -> Any:
    kinds = {"half": "train", "score": "evaluate", "text": "data"}
    return SimpleNamespace(stages={key: SimpleNamespace(kind=kind) for key, kind in kinds.items()})


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_it_is_written_for_results_alone_and_one_at_a_time(
    graph: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "FIRST_SECONDS", 0.0)
    log = tmp_path / "log"
    report = live.LiveReport([sys.executable, "-c", SLOW, str(log), "600"])
    report.show(graph, tick("text"))
    assert not writing(report)
    report.show(graph, tick("score"))
    wait_for(log)
    for _ in range(5):
        report.show(graph, tick("half"))
    assert writing(report)
    assert report._process is not None
    assert os.getpriority(os.PRIO_PROCESS, report._process.pid) == 10, "it takes cores from jobs"
    report.end()
    assert not writing(report)
    assert log.read_text() == "x"


def test_none_is_made_where_none_is_wanted() -> None:
    with live.live_report(["quickstart"], "memory://x", wanted=False) as report:
        assert report is None
