"""Jobs that an earlier driver submitted are cancelled and read, whatever has become of its site file."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.commands.sites import site_of
from orchestrator.errors import EXIT_UNREACHABLE, MoegridError
from orchestrator.resources import ROOT
from orchestrator.store.attempts import Submission
from tests.fake_slurm import Scheduler, scheduler

__all__ = ["scheduler"]


SITE = "backend: slurm\nlease_seconds: 1\n"


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a driver that has ended leaves: queued jobs, submitted by a site file beside the store."""
    folder = tmp_path_factory.mktemp("left")
    (folder / "mine.yaml").write_text(SITE)
    (folder / "bin").mkdir()
    Scheduler(folder / "bin")
    command = [sys.executable, "-m", "orchestrator", "run", "quickstart", "--detach", "--site", "mine.yaml"]
    environment = {
        **os.environ,
        "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "MOEGRID_SLURM_LOGS": str(folder / "logs"),
        "MOEGRID_RUN_DIR": str(folder / "run"),
    }
    command += ["--store", "store", "--tracking", "none"]
    done = subprocess.run(
        command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 130, done.stderr
    return folder


@pytest.fixture
def folder(left: Path, scheduler: Scheduler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The driver's folder as it left it, with a store of the test's own."""
    store = left / "store"
    shutil.copytree(store, tmp_path / "saved")
    monkeypatch.setenv("MOEGRID_STORE", str(store))
    monkeypatch.setenv("MOEGRID_TRACKING", "none")
    monkeypatch.setenv("MOEGRID_RUN_DIR", str(left / "run"))
    monkeypatch.chdir(left)
    yield left
    shutil.rmtree(store)
    (tmp_path / "saved").rename(store)
    (left / "mine.yaml").write_text(SITE)


def old_submission(folder: Path) -> None:
    """Submissions of earlier versions name their site alone."""
    for path in folder.glob("store/submissions/*.json"):
        document = json.loads(path.read_text())
        for name in ("site_file", "backend", "checksum"):
            document.pop(name, None)
        path.write_text(json.dumps(document))
    (folder / "mine.yaml").unlink()


def no_handles(folder: Path) -> None:
    """The driver died before it could write down what its jobs are called."""
    commands = Path(os.environ["PATH"].split(os.pathsep)[0])
    names = {path.parent.name for path in folder.glob("logs/*/submission-*.sh")}
    lines = [f"7|{task}|{name}|PENDING|0|None|0|1||\n" for name in names for task in range(3)]
    with (commands / "squeue.out").open("a") as file:
        file.writelines(lines)
    for path in folder.glob("store/attempts/*/handle.json"):
        path.unlink()


CASES: dict[str, Callable[[Path], object]] = {
    "as it was": lambda folder: None,
    "elsewhere": lambda folder: os.chdir("/"),
    "gone": lambda folder: (folder / "mine.yaml").unlink(),
    "broken": lambda folder: (folder / "mine.yaml").write_text("backend: ["),
    "another backend": lambda folder: (folder / "mine.yaml").write_text("backend: local"),
    "old": old_submission,
    "no submission": lambda folder: list(map(os.remove, folder.glob("store/submissions/*.json"))),
    "no handles": no_handles,
    "leases run out": lambda folder: time.sleep(1.1),
}


@pytest.mark.parametrize("case", CASES)
def test_every_queued_job_is_cancelled(
    folder: Path, scheduler: Scheduler, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    CASES[case](folder)
    assert cli.main(["cancel", "quickstart"]) == 0
    assert "asked 3 jobs" in capsys.readouterr().err
    assert [call for call in scheduler.calls if call.startswith("scancel")] == ["scancel --quiet 7_[0-2]"]


@pytest.mark.parametrize("case", ["as it was", "gone", "broken", "old"])
def test_the_log_of_a_job_is_read(folder: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    for path in folder.glob("logs/*/submission-*.sh"):
        (path.parent / "job-0.log").write_text("what the job said\n")
    CASES[case](folder)
    attempt = next(path.parent.name for path in folder.glob("store/attempts/*-0/handle.json"))
    assert cli.main(["logs", f"quickstart:{attempt}"]) == 0
    assert capsys.readouterr().out == "what the job said\n"


def test_a_scheduler_that_is_away_is_said(
    folder: Path, scheduler: Scheduler, capsys: pytest.CaptureFixture[str]
) -> None:
    scheduler.fails(scancel="Unable to contact slurm controller (connect failure)")
    assert cli.main(["cancel", "quickstart"]) == EXIT_UNREACHABLE
    assert "scancel cannot reach SLURM" in capsys.readouterr().err


def test_a_batch_that_says_nothing_of_its_scheduler_asks_for_the_site_file(tmp_path: Path) -> None:
    with pytest.raises(MoegridError, match="unknown site 'mine'"):
        site_of(Submission("b", (), site="mine"), None)
    path = tmp_path / "mine.yaml"
    path.write_text("backend: slurm\nqos: low\n")
    assert site_of(Submission("b", (), site="mine"), None, given=str(path)).settings.qos == "low"
    other = tmp_path / "other.yaml"
    other.write_text("backend: slurm\nqos: high\n")
    assert (
        site_of(Submission("b", (), site="other", site_file=str(other)), None, given=str(path)).settings.qos == "high"
    )
