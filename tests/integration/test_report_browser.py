"""The report in a real browser, where one is installed: nothing is said on its console, and every section is there."""

from __future__ import annotations

import shutil
import subprocess
import uuid
from pathlib import Path

import pytest

from orchestrator.report import html
from orchestrator.report.collect import collect
from orchestrator.store import Store
from tests.grid_store import GridStore
from tests.labs import lab_missing

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)


@pytest.fixture
def chromium() -> str:
    """The path of a Chromium; where there is none the test is skipped, and fails in CI."""
    if not CHROMIUM:
        lab_missing("browser", "no Chromium here (Debian: bash infra/browser/install.sh)")
    return CHROMIUM


def test_the_page_opens_without_a_word_on_the_console(tmp_path: Path, chromium: str) -> None:
    store = Store.open(f"memory://{uuid.uuid4().hex}")
    grid = GridStore(store, probes=True)
    grid.commit_all()
    page = html.write(collect("demo", store), tmp_path / "index.html")
    words = [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--screenshot={tmp_path / 'page.png'}",
        "--window-size=400,900",
    ]
    shown = subprocess.run(
        [chromium, *FLAGS, *words, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=180, check=True
    )
    assert "CONSOLE" not in shown.stderr
    for section in ("results", "differences", "training", "loads", "routing", "provenance"):
        assert f'<section id="{section}">' in shown.stdout
