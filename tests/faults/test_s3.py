"""The whole engine on a real S3 server: the same bits as in a folder, a killed driver, a server that goes away."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.faults.harness import Lab, assert_sound
from tests.s3_lab import Proxy, S3Lab


def test_a_bucket_gives_the_same_results_as_a_folder(lab: Lab, reference: dict[str, Any], s3: S3Lab) -> None:
    lab.url = s3.fresh_url()
    lab.environment["FAKE_SECONDS"] = "0.3"
    driver = lab.start()
    lab.wait_for(lambda: len(lab.executions()) >= 4, "the first stages", seconds=60)
    driver.kill()
    code, said = lab.drive("resume")
    assert code == 0, said
    assert_sound(lab, reference)
    code, said = lab.drive()
    assert code == 0, said
    assert "nothing to do" in said


@pytest.mark.faults
@pytest.mark.parametrize("stages", [1, 4, 7, 10])
def test_a_server_that_is_away_for_a_while_costs_nothing_but_time(
    lab: Lab, reference: dict[str, Any], s3: S3Lab, proxy: Proxy, stages: int
) -> None:
    lab.url = s3.fresh_url()
    lab.environment["FAKE_SECONDS"] = "0.3"
    driver = lab.start()
    lab.wait_for(lambda: len(lab.executions()) >= stages, "the first stages", seconds=60)
    proxy.cut()
    time.sleep(5)
    proxy.restore()
    said = driver.communicate(timeout=110)[0]
    assert driver.returncode == 0, said
    assert_sound(lab, reference, once=False)
