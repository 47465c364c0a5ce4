"""What can happen on a Ray cluster happens on the lab's: the grid ends as if it had not."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import HERE, Lab, assert_sound, trained
from tests.lab_ray import RayLab

pytestmark = pytest.mark.faults


@pytest.fixture
def cluster(ray_lab: RayLab, tmp_path: Path) -> Iterator[Lab]:
    """A fresh store whose jobs run on a whole cluster."""
    ray_lab.up()
    made = Lab(tmp_path, site=tmp_path / "ray.yaml")
    yield made
    made.close()
    ray_lab.up()


def train_on(cluster: Lab, node: str) -> Any:
    """Start a driver whose jobs run on one node; return it when the pretraining is in mid-step."""
    cluster.site.write_text((HERE / "ray.yaml").read_text() + f"custom_resources: {{{node}: 0.01}}\n")
    driver = cluster.start(FAKE_STEP_SECONDS="0.2")
    cluster.wait_for(lambda: trained(cluster), "training", 180)
    beats = cluster.store_path / "attempts"
    steps = re.compile(r'"step": (?:[1-9]|[1-9]\d)\b')  # not so many that it could be over before the node is
    cluster.wait_for(
        lambda: any(steps.search(path.read_text()) for path in beats.glob("*/heartbeat.json")), "steps", 60
    )
    return driver


def test_a_killed_node_costs_one_attempt(ray_lab: RayLab, cluster: Lab, reference: dict[str, Any]) -> None:
    driver = train_on(cluster, "node2")
    ray_lab.kill_node("node2")
    ray_lab.up()
    said = driver.communicate(timeout=300)[0]
    assert driver.returncode == 0, said
    assert_sound(cluster, reference, once=False)
    assert len(trained(cluster)) == 2, said


def test_a_cluster_whose_control_store_ends_is_gone_and_the_next_one_goes_on(
    ray_lab: RayLab, cluster: Lab, reference: dict[str, Any]
) -> None:
    driver = train_on(cluster, "head")
    for node in ("head", "node2"):
        ray_lab.kill_node(node)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    ray_lab.up()
    code, said = cluster.drive("resume", FAKE_STEP_SECONDS="0.02")
    assert code == 0, said
    assert_sound(cluster, reference, once=False)
    assert len(trained(cluster)) == 2, said
