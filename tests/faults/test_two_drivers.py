"""Several drivers at once, on one grid or on grids that share stages; attempts that wake up too late."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from typing import Any

import pytest

from tests.faults.harness import Lab, assert_sound, graph, trained


def ends_well(*drivers: subprocess.Popen[str]) -> list[str]:
    """Wait for the drivers; return what they said."""
    said = [driver.communicate(timeout=90)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0] * len(drivers), "\n".join(said)
    return said


def test_two_drivers_on_one_grid_share_the_work(lab: Lab, reference: dict[str, Any]) -> None:
    lab.environment["FAKE_SECONDS"] = "0.2"
    ends_well(lab.start(), lab.start())
    assert_sound(lab, reference)


def test_two_grids_that_share_stages_do_each_stage_once(lab: Lab, reference: dict[str, Any]) -> None:
    lab.environment["FAKE_SECONDS"] = "0.2"
    ends_well(lab.start(only=("freeze=none",)), lab.start(only=("freeze=none->router",)))
    assert_sound(lab, reference)


def test_an_attempt_that_wakes_up_after_it_was_replaced_commits_nothing(lab: Lab, reference: dict[str, Any]) -> None:
    lab.environment["FAKE_STEP_SECONDS"] = "0.02"
    stalled = lab.start()
    lab.wait_for(lambda: trained(lab), "the training to begin")
    jobs = lab.job_pids()
    for pid in (stalled.pid, *jobs):
        os.kill(pid, signal.SIGSTOP)
    # Another machine sees neither process: the lease alone decides.
    ends_well(lab.start(FAKE_HOST="elsewhere:1:1", FAKE_STEP_SECONDS="0"))
    taken_over = lab.results()
    assert taken_over == reference
    for pid in (*jobs, stalled.pid):
        os.kill(pid, signal.SIGCONT)
    ends_well(stalled)
    assert_sound(lab, reference, once=False)
    tokens: dict[str, list[int]] = {}
    for line in lab.executions():
        tokens.setdefault(line["stage"], []).append(line["token"])
    assert all(sorted(set(held)) == held for held in tokens.values()), "fencing tokens only grow"


@pytest.mark.faults
def test_a_stalled_job_of_this_machine_is_ended_and_replaced(lab: Lab, reference: dict[str, Any]) -> None:
    lab.environment["FAKE_STEP_SECONDS"] = "0.02"
    driver = lab.start()
    stalled = lab.wait_for(lambda: trained(lab), "the training to begin")[0]["pid"]
    os.kill(stalled, signal.SIGSTOP)
    said = driver.communicate(timeout=90)[0]
    assert driver.returncode == 0, said
    assert stalled not in lab.job_pids()
    assert_sound(lab, reference, once=False)


def test_detached_ticks_carry_a_grid_to_its_end(lab: Lab, reference: dict[str, Any]) -> None:
    code, said = lab.drive("run", "--detach")
    assert code == 130, said
    assert "moegrid tick" in said
    end = time.monotonic() + 90
    while (answer := lab.drive("tick"))[0] == 130 and time.monotonic() < end:
        pass
    assert answer[0] == 0, answer[1]
    assert_sound(lab, reference)


def test_cancel_stops_a_driver_and_its_jobs(lab: Lab, reference: dict[str, Any]) -> None:
    lab.environment["FAKE_STEP_SECONDS"] = "0.05"
    driver = lab.start()
    lab.wait_for(lambda: trained(lab), "the training to begin")
    code, said = lab.drive("cancel")
    assert code == 0, said
    said = driver.communicate(timeout=30)[0]
    assert driver.returncode == 130, said
    assert not lab.job_pids()


@pytest.mark.parametrize("skew", ["-86400", pytest.param("86400", marks=pytest.mark.faults)])
def test_clocks_that_are_wrong_by_a_day_change_nothing(lab: Lab, reference: dict[str, Any], skew: str) -> None:
    lab.environment["FAKE_SECONDS"] = "0.1"
    ends_well(lab.start(FAKE_SKEW=skew), lab.start())
    assert_sound(lab, reference)


def test_gc_spares_a_grid_that_is_being_made(lab: Lab, reference: dict[str, Any]) -> None:
    lab.environment["FAKE_SECONDS"] = "0.1"
    driver = lab.start()
    while driver.poll() is None:
        collected = lab.start("gc", only=())
        collected.communicate(timeout=60)
    said = driver.communicate()[0]
    assert driver.returncode == 0, said
    assert_sound(lab, reference)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(10))
def test_drivers_that_come_and_go(lab: Lab, reference: dict[str, Any], seed: int) -> None:
    lab.environment["FAKE_SECONDS"] = "0.1"
    drivers = [lab.start() for _ in range(3)]
    for index, driver in enumerate(drivers[:2]):
        time.sleep(0.5 + 0.17 * ((seed + index) % 7))
        driver.kill()
        driver.communicate()
    ends_well(drivers[2])
    assert lab.drive("resume")[0] == 0
    assert_sound(lab, reference)


def test_graph_of_the_harness_has_shared_stages() -> None:
    assert any(len(users) == 2 for users in graph().users.values())
