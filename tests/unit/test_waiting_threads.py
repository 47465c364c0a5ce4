"""How the threads of a job wait for work: spinning on idle cores, asleep where others want them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jobs.node import numerics
from orchestrator.spec.cell import Resources


@pytest.mark.parametrize(("cores", "busy", "spins"), [(1, 0, False), (2, 0, True), (2, 1, False), (2, 6, False)])
def test_threads_spin_only_on_idle_cores(monkeypatch: pytest.MonkeyPatch, cores: int, busy: float, spins: bool) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(numerics, "busy_threads", lambda: busy)
    monkeypatch.setattr(numerics, "allowed_cores", lambda: 2)
    numerics.set_threads(Resources(cores=cores))
    assert os.environ["OMP_NUM_THREADS"] == str(cores)
    assert (int(os.environ.get("GOMP_SPINCOUNT", 0)) > 0) == spins


def test_what_gives_way_keeps_no_core_busy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The publisher to a tracker must not decide how the threads of training wait."""
    stat = tmp_path / "stat"
    monkeypatch.setattr(numerics, "STAT", stat)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_CLK_TCK": 100}[name])
    assert numerics.busy_threads(0.0001) == 0.0, "no such file"
    lines = iter(["cpu  500 70 30 9000 1 0 2 0 0 0\ncpu0 1 2 3\n", "cpu  540 120 40 9001 1 0 2 0 0 0\ncpu0 1 2 3\n"])
    stat.write_text(next(lines))
    monkeypatch.setattr("time.sleep", lambda seconds: stat.write_text(next(lines)))
    assert numerics.busy_threads(0.5) == 1.0  # 40 + 10 of 50 ticks, and not 100
    stat.write_text("busy\n")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert numerics.busy_threads(0.5) == 0.0


@pytest.mark.parametrize("own", [{"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_a_users_wait_policy_stays(monkeypatch: pytest.MonkeyPatch, own: dict[str, str]) -> None:
    monkeypatch.setattr(os, "environ", dict(own))
    numerics.set_threads(Resources(cores=2))
    waiting = {name: text for name, text in os.environ.items() if name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    assert waiting == own


@pytest.mark.parametrize(
    ("cores", "kinds", "busy", "own", "fits"),
    [
        (1, ["init", "evaluate"], 9, {}, True),
        (2, ["train", "train"], 0, {}, True),
        (2, ["train"], 2, {}, False),  # its threads would spin where others want the cores
        (2, ["train"], 2, {"GOMP_SPINCOUNT": "7"}, True),
        (2, ["init", "train"], 0, {}, False),  # threads of more than torch
    ],
)
def test_a_fork_does_what_it_would_do_as_a_process_of_its_own(
    monkeypatch: pytest.MonkeyPatch, cores: int, kinds: list[str], busy: int, own: dict[str, str], fits: bool
) -> None:
    monkeypatch.setattr(os, "environ", dict(own))
    monkeypatch.setattr(numerics, "busy_threads", lambda: busy)
    monkeypatch.setattr(numerics, "allowed_cores", lambda: 2)
    monkeypatch.setattr(numerics, "_loaded", None)
    assert numerics.fits_fork(Resources(cores=cores), kinds), "this process is no fork"
    numerics.prepare_forks()
    assert os.environ["OMP_NUM_THREADS"] == "1"
    numerics.set_threads(Resources(cores=cores))
    assert numerics.fits_fork(Resources(cores=cores), kinds) is fits
    numerics.leave_fork()
    assert {name: text for name, text in os.environ.items() if name in numerics.WAITING} == own
