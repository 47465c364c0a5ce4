"""Jobs die, hang, lie about their end or fail: the grid goes on, and nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import pytest

from tests.faults.harness import Lab, assert_sound, graph, trained


def test_a_job_killed_in_mid_step_goes_on_from_its_last_state(lab: Lab, reference: dict[str, Any]) -> None:
    lab.environment["FAKE_STEP_SECONDS"] = "0.01"
    driver = lab.start()
    begun = lab.wait_for(lambda: trained(lab), "the training to begin")
    pretrain = begun[0]["stage"]
    time.sleep(0.7)
    os.kill(begun[0]["pid"], signal.SIGKILL)
    said = driver.communicate(timeout=60)[0]
    assert driver.returncode == 0, said
    assert "killed by SIGKILL" in said
    assert_sound(lab, reference, once=False)
    again = [line["stage"] for line in lab.executions()]
    assert again.count(pretrain) == 2
    assert len(again) == len(reference) + 1


def test_jobs_outlive_their_driver_and_are_found_again(lab: Lab, reference: dict[str, Any]) -> None:
    lab.environment["FAKE_STEP_SECONDS"] = "0.03"
    driver = lab.start()
    lab.wait_for(lambda: trained(lab), "the training to begin")
    driver.kill()
    alive = lab.job_pids()
    assert alive
    code, said = lab.drive("resume")
    assert code == 0, said
    assert_sound(lab, reference, once=True)


def test_a_job_killed_with_its_driver_is_taken_over_before_its_lease_ends(lab: Lab, reference: dict[str, Any]) -> None:
    lab.environment["FAKE_STEP_SECONDS"] = "0.05"
    driver = lab.start()
    lab.wait_for(lambda: trained(lab), "the training to begin")
    driver.kill()
    driver.wait()
    assert lab.job_pids()
    for pid in lab.job_pids():
        os.kill(pid, signal.SIGKILL)
    lab.environment["FAKE_STEP_SECONDS"] = "0"
    code, said = lab.drive("resume")
    assert code == 0, said
    # A forked job's end is seen by its server, which outlives the driver; that of a process of its own by nobody.
    assert "killed by SIGKILL" in said or "the process is gone" in said
    assert_sound(lab, reference, once=False)


def test_ctrl_c_saves_states_and_resume_goes_on_from_there(lab: Lab, reference: dict[str, Any]) -> None:
    lab.environment["FAKE_STEP_SECONDS"] = "0.02"
    driver = lab.start()
    lab.wait_for(lambda: trained(lab), "the training to begin")
    time.sleep(0.5)
    driver.send_signal(signal.SIGINT)
    said = driver.communicate(timeout=30)[0]
    assert driver.returncode == 130, said
    assert "moegrid resume quickstart" in said
    assert not lab.job_pids()
    lab.environment["FAKE_STEP_SECONDS"] = "0"
    code, said = lab.drive("resume")
    assert code == 0, said
    assert "~ resume 1" in said
    assert_sound(lab, reference, once=False)


def test_ctrl_c_twice_ends_everything_now(lab: Lab, reference: dict[str, Any]) -> None:
    lab.environment["FAKE_STEP_SECONDS"] = "30"
    driver = lab.start()
    lab.wait_for(lambda: trained(lab), "the training to begin")
    os.kill(driver.pid, signal.SIGINT)
    time.sleep(0.3)
    os.kill(driver.pid, signal.SIGINT)
    said = driver.communicate(timeout=10)[0]
    assert driver.returncode == 130, said
    assert not lab.job_pids()
    lab.environment["FAKE_STEP_SECONDS"] = "0"
    code, said = lab.drive("resume")
    assert code == 0, said
    assert_sound(lab, reference, once=False)


def test_one_cell_that_fails_does_not_stop_the_others(lab: Lab, reference: dict[str, Any]) -> None:
    lab.order({"label": "finetune 25-50 freeze router", "do": "nan"})
    code, said = lab.drive()
    assert code == 1, said
    assert said.count("failed nan: the loss is not finite at step 7") == 1
    assert "hint: lower the learning rate" in said
    assert "1 cell done, 1 not" in said
    failed = next(key for key, stage in graph().stages.items() if "25-50 freeze router" in stage.label)
    assert [line["stage"] for line in lab.executions()].count(failed) == 1
    assert "blocked" in lab.drive("status")[1] or "failed" in lab.drive("status")[1]
    code, said = lab.drive("resume")
    assert code == 1, "a loss that diverged is not tried again by itself"
    assert [line["stage"] for line in lab.executions()].count(failed) == 1
    lab.order()
    code, said = lab.drive("resume", "--retry", "all")
    assert code == 0, said
    assert_sound(lab, reference, once=False)


def test_an_import_error_fails_at_once_and_is_the_works_own(lab: Lab, reference: dict[str, Any]) -> None:
    lab.order({"label": "tokenizer", "do": "import", "times": 1})
    code, said = lab.drive()
    assert code == 1, said
    assert "a_package_that_does_not_exist" in said
    assert lab.drive("resume")[0] == 1
    assert len(lab.executions()) == len({line["stage"] for line in lab.executions()}), "it was tried again"
    code, said = lab.drive("resume", "--retry", "all")
    assert code == 0, said
    assert_sound(lab, reference, once=False)


def test_a_job_that_dies_for_ever_uses_up_its_budget(lab: Lab) -> None:
    lab.order({"label": "pretrain", "do": "kill"})
    code, said = lab.drive()
    assert code == 1, said
    assert "the last of 6" in said
    pretrain = next(key for key, stage in graph().stages.items() if stage.phase == "pretrain")
    assert [line["stage"] for line in lab.executions()].count(pretrain) == 6


def test_exit_codes_without_a_report_are_classified(lab: Lab, reference: dict[str, Any]) -> None:
    lab.order(
        {"label": "evaluation items", "do": "exit", "code": 75, "times": 1},
        {"label": "lm at 1", "do": "error", "message": "NCCL error: unhandled system error", "times": 1},
    )
    code, said = lab.drive()
    assert code == 0, said
    assert_sound(lab, reference, once=False)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(20))
def test_random_kills_of_jobs_and_drivers(lab: Lab, reference: dict[str, Any], seed: int) -> None:
    chance = random.Random(seed)
    lab.environment["FAKE_STEP_SECONDS"] = "0.01"
    for _ in range(4):
        driver = lab.start("resume")
        time.sleep(chance.uniform(0.6, 2.5))
        for pid in lab.job_pids():
            if chance.random() < 0.5:
                os.kill(pid, signal.SIGKILL)
        if chance.random() < 0.7:
            driver.kill()
        driver.communicate(timeout=60)
    lab.environment["FAKE_STEP_SECONDS"] = "0"
    code, said = lab.drive("resume")
    assert code == 0, said
    assert_sound(lab, reference, once=False)
