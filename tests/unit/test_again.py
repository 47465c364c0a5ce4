"""The line that goes on with a run can be typed where the run was started, and means the same run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.commands import again
from orchestrator.ui.typed import as_typed, program

ROOT = Path(cli.__file__).resolve().parents[1]
PLACES = ("MOEGRID_STORE", "MOEGRID_TRACKING", "MLFLOW_TRACKING_URI")


@pytest.fixture(autouse=True)
def no_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def line(*words: str, name: str = "resume") -> list[str]:
    """Return the words of the continuation of a command line."""
    return shlex.split(again.command(cli.parse(["run", *words]), name))


def test_nothing_is_said_that_the_defaults_say() -> None:
    assert line("quickstart") == ["moegrid", "resume", "quickstart"]
    assert line("quickstart", "--store", "runs", "--retry", "all", "--verify") == ["moegrid", "resume", "quickstart"]


@pytest.mark.parametrize(
    "words",
    [
        ["--store", "/some where/it's", "--tracking", "sqlite:///x.db"],
        ["--tracking", "none", "--scale", "small", "--site", "sites/my site.yaml"],
        ["--seeds", "0,1", "--nodes", "2", "--processes", "4", "--no-share"],
        ["--only", "freeze=none->router", "--only", "seed=1", "set.finetune.lr=1e-4", "factors.seed=[0, 1]"],
        ["--set", 'set.evaluate.generation.template=a b $HOME `x` "q" {prompt}'],
        ["--allow-numerics", "--no-report", "--max-jobs", "3", "--max-gpu-hours", "12.5"],
    ],
)
def test_the_line_means_the_same_run(words: list[str]) -> None:
    first = cli.parse(["resume", "my grid.yaml", *words])
    again_words = shlex.split(again.command(first, "resume"))[1:]
    assert vars(cli.parse(again_words)) == vars(first)


def test_places_of_the_environment_are_said_but_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGRID_STORE", "s3://bucket/x")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert line("quickstart")[3:] == ["--store", "s3://bucket/x", "--tracking", "http://host:5000"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000")
    assert "secret" not in " ".join(line("quickstart"))
    monkeypatch.setenv("MOEGRID_TRACKING", "none")
    assert line("quickstart")[5:] == ["--tracking", "none"]


def test_a_command_that_does_not_drive_takes_no_options_of_a_run() -> None:
    assert line("quickstart", "--max-jobs", "3", name="table") == ["moegrid", "table", "quickstart"]
    cli.parse(line("quickstart", "--max-jobs", "3", "--no-report", name="sync")[1:])


def test_the_program_is_named_as_it_can_be_typed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "en v" / "bin" / "moegrid"
    script.parent.mkdir(parents=True)
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert program() == "'en v/bin/moegrid'"
    assert as_typed("go on with: moegrid resume x; a moegrid store") == (
        "go on with: 'en v/bin/moegrid' resume x; a moegrid store"
    )
    monkeypatch.chdir(script.parent)
    assert program() == "./moegrid"
    monkeypatch.chdir("/usr")
    assert program() == shlex.quote(str(script))
    monkeypatch.setenv("PATH", f"{script.parent}:/usr/bin")
    assert program() == "moegrid"
    other = tmp_path / "other" / "moegrid"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    monkeypatch.setenv("PATH", f"{other.parent}:{script.parent}")
    assert program() == shlex.quote(str(script))  # another installation's comes first
    monkeypatch.setattr(sys, "argv", ["/x/orchestrator/__main__.py"])
    assert program() == f"{shlex.quote(sys.executable)} -m orchestrator"


def test_a_shell_understands_the_line_where_it_was_printed(tmp_path: Path) -> None:
    (tmp_path / "my grids").mkdir()
    (tmp_path / "my grids" / "it's.yaml").write_text("name: its\nbase: finetune\nfactors: {freeze: [none, router]}\n")
    words = [sys.executable, "-m", "orchestrator", "logs", "my grids/it's.yaml", "--only", "freeze=none"]
    words += ["set.evaluate.generation.template=Say it {prompt}", "--store", "the store", "--tracking", "none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    said = subprocess.run(words, capture_output=True, text=True, env=environment, check=False).stderr
    found = said.partition("run it first: ")[2].strip()
    assert "'the store'" in found
    planned = subprocess.run(
        found.replace(" run ", " plan --json ", 1),
        shell=True,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["cells"] == 1
