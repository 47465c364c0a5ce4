"""`moegrid paper --run`: what is to run and for how long is told first; told to stop, it stops once, and goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import cli
from orchestrator.commands import paper
from orchestrator.errors import EXIT_DETACHED, EXIT_DONE, EXIT_USAGE
from orchestrator.report import paper as exhibits
from orchestrator.report.papers.declared import declared
from orchestrator.store import Store
from tests.grid_store import GridStore

ROOT = Path(cli.__file__).resolve().parents[1]
RUN = """
import signal, sys, time
from orchestrator.commands import paper
from orchestrator import cli
import subprocess
real = subprocess.Popen
child = '''
import signal, sys, time
got = []
signal.signal(signal.SIGINT, lambda *_: got.append(2))
signal.signal(signal.SIGTERM, lambda *_: got.append(15))
print("up", flush=True)
while not got:
    time.sleep(0.02)
time.sleep(0.5)
print("got", *got, flush=True)
sys.exit(130)
'''
subprocess.Popen = lambda words, **more: real([sys.executable, "-c", child], **more)
print("code", *paper._run(["grid"]), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_run_once_and_its_end_is_awaited(number: signal.Signals) -> None:
    # A session of its own: no terminal sends the signal to the run as well.
    process = subprocess.Popen(
        [sys.executable, "-c", RUN],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    os.kill(process.pid, number)
    assert process.communicate(timeout=30)[0] == f"got {int(number)}\ncode 130 True\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_while_the_run_is_started_reaches_it(number: signal.Signals) -> None:
    early = RUN.replace(
        "Popen = lambda words, **more: ", f"Popen = lambda words, **more: signal.raise_signal({number:d}) or "
    )
    process = subprocess.run(
        [sys.executable, "-c", early],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        timeout=60,
    )
    assert process.returncode == 0
    assert process.stdout.endswith("True\n")


def test_where_a_terminal_sends_ctrl_c_to_both_it_is_not_sent_again() -> None:
    """The kernel's own way: a session with a terminal, whose foreground group gets what is typed."""
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", RUN])
    said = b""
    end = time.monotonic() + 60
    while b"True" not in said and time.monotonic() < end:
        try:
            said += os.read(terminal, 1000)
        except OSError:
            break
        if said == b"up\r\n":
            os.write(terminal, b"\x03")
    os.close(terminal)
    os.waitpid(pid, 0)
    assert b"got 2\r\n" in said
    assert b"code 130 True" in said


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose two grids are all that exhibits wait for."""
    monkeypatch.setenv("MOEGRID_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("MOEGRID_TRACKING", "none")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("orchestrator.report.paper.to_run", lambda store: ["finetune_epochs", "libmoe_router_init"])
    return tmp_path


def test_what_is_to_run_and_for_how_long_is_told_before_anything_runs(
    short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[list[str]] = []

    def run(words: list[str]) -> tuple[int, bool]:
        ran.append(words)
        return (EXIT_DETACHED, False) if len(ran) == 2 else (EXIT_DONE, False)

    monkeypatch.setattr(paper, "_run", run)
    assert cli.main(["paper", "--run", "tiny", "--store", str(short / "store")]) == EXIT_DETACHED
    out, err = capsys.readouterr()
    assert [words[0] for words in ran] == ["finetune_epochs", "libmoe_router_init"]
    assert ran[0][1:3] == ["--scale", "tiny"]
    assert "finetune_epochs     2 cells" in err
    assert "together at most about" in err
    assert "stopped at 2 of 2 grids; left: libmoe_router_init" in err
    assert f"go on with: moegrid paper --run tiny --store {short / 'store'}" in err
    assert out == ""
    assert not (short / "reports").exists()


def test_a_scale_that_this_machine_cannot_run_is_told_before_anything_runs(
    short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paper, "_run", lambda words: pytest.fail("it ran"))
    assert cli.main(["paper", "--run", "paper"]) == EXIT_USAGE
    err = capsys.readouterr().err
    assert "error: grid 'finetune_epochs' cannot run at scale 'paper' on this machine" in err
    assert "hint: --run tiny here" in err
    assert cli.main(["paper", "--run", "tinny"]) == EXIT_USAGE
    assert "did you mean 'tiny'?" in capsys.readouterr().err


def test_gpus_that_this_machine_lacks_are_told_before_anything_runs(
    short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = "base: finetune\nfactors: {seed: [0]}\nevaluate: [lm]\nset: {execution.resources.finetune.gpus: 2}\n"
    (short / "wide.yaml").write_text(f"name: wide\ndescription: of two GPUs\n{asked}")
    monkeypatch.setattr("orchestrator.report.paper.to_run", lambda store: ["finetune_epochs", str(short / "wide.yaml")])
    monkeypatch.setattr(paper, "_run", lambda words: pytest.fail("it ran"))
    monkeypatch.setenv("MOEGRID_GPUS", "1")
    assert cli.main(["paper", "--run", "tiny"]) == EXIT_USAGE
    assert "error: this machine has 1 GPUs, and the grid asks for 2" in capsys.readouterr().err


def test_where_nothing_is_to_run_it_says_so(
    short: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("orchestrator.report.paper.to_run", lambda store: [])
    assert cli.main(["paper", "--run", "tiny"]) == EXIT_DONE
    assert "nothing to run" in capsys.readouterr().err


@pytest.fixture
def store() -> Store:
    return Store.open(f"memory://{uuid.uuid4().hex}")


def test_what_is_to_run_is_what_an_exhibit_waits_for(store: Store, tmp_path: Path) -> None:
    every = exhibits.to_run(store)
    assert every[:2] == ["finetune_freeze", "pretrain_router"]
    assert "libmoe_vlm" in every
    assert "rbench_robustness" not in every, "all of its exhibits need data of the user's"
    GridStore(
        store, name="libmoe_router_init", probes=True
    ).commit_all()  # of other factors: its figure cannot be made of them
    assert "libmoe_router_init" in exhibits.to_run(store)
    half = GridStore(Store.open(f"memory://{uuid.uuid4().hex}"), name="pretrain_router")
    half.commit_all(half.cell("none", 0)["stages"])
    item = next(i for i in exhibits.write(half.store, tmp_path) if i.exhibit.grid == "pretrain_router")
    assert item.reason == "of the grid pretrain_router 1 of 12 cells are done"
    assert item.command == "moegrid run pretrain_router --scale tiny"
    harmful = GridStore(Store.open(f"memory://{uuid.uuid4().hex}"), name="safety_freeze")
    harmful.commit_all(harmful.cell("none", 0)["stages"])
    item = next(i for i in exhibits.write(harmful.store, tmp_path) if i.exhibit.name == "Table 9")
    assert item.reason.startswith("of the grid safety_freeze 1 of 12 cells are done; it needs harmful prompts")


def test_a_grid_that_makes_all_that_waits_for_it_is_not_run_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    GridStore(store, name="finetune_freeze", probes=True).commit_all()
    assert "finetune_freeze" in exhibits.to_run(store)  # Tables 5 and 8 are of the other backbone
    mine = [e for e in declared().exhibits if e.grid != "finetune_freeze" or e.backbone == "olmoe"]
    mine = [e for e in mine if e.name not in ("Figure 7",)]
    monkeypatch.setattr(exhibits, "declared", lambda: replace(declared(), exhibits=tuple(mine)))
    assert "finetune_freeze" not in exhibits.to_run(store)
    GridStore(store, name="finetune_freeze", seeds=(0, 1, 2, 3)).commit_all([])
    assert "finetune_freeze" in exhibits.to_run(store), "a cell of its newest version is not done"
