"""What can happen on a cluster happens on the lab's: the grid ends as if it had not, on whatever site it goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.backends.slurm_records import expand
from tests.faults.harness import HERE, SITE, Lab, assert_sound, graph
from tests.faults.test_outer_jobs import OUTER
from tests.faults.unsound_slurm import calls, unsound
from tests.lab_slurm import SlurmLab, eventually

PRETRAIN = next(key for key, stage in graph().stages.items() if stage.phase == "pretrain")


@pytest.fixture
def cluster(slurm_lab: SlurmLab, tmp_path: Path) -> Iterator[Lab]:
    """A fresh store whose jobs run on the cluster; they end with the test."""
    made = Lab(tmp_path, {"MOEGRID_SLURM_LOGS": str(tmp_path / "logs")}, site=HERE / "slurm.yaml")
    yield made
    made.close()
    subprocess.run(["scancel", "--user=root"], check=False, timeout=60)
    eventually(lambda: not slurm_lab.run("squeue", "--noheader"))


def training(cluster: Lab) -> str:
    """Wait until the pretraining is in mid-step; return the scheduler's id of its job."""
    begun = cluster.wait_for(
        lambda: [line for line in cluster.executions() if line["stage"] == PRETRAIN], "training", 180
    )
    attempt = begun[-1]["attempt"]
    found = cluster.wait_for(lambda: cluster.store().get_json(f"attempts/{attempt}/handle.json"), "the handle", 60)
    time.sleep(0.7)
    return str(found["id"])


def times_trained(cluster: Lab) -> int:
    return sum(line["stage"] == PRETRAIN for line in cluster.executions())


def finish(driver: subprocess.Popen[str], seconds: float = 300) -> str:
    try:
        said = driver.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        driver.kill()
        said = driver.communicate()[0]
    assert driver.returncode == 0, said
    return said


def test_a_preempted_job_saves_its_state_and_goes_on(
    slurm_lab: SlurmLab, cluster: Lab, reference: dict[str, Any]
) -> None:
    driver = cluster.start(FAKE_STEP_SECONDS="0.02")
    training(cluster)
    rush = ["--qos=high", "--nodes=4", "--exclusive", "--mem=0", "--time=1", "--output=/dev/null", "--wrap=sleep 1"]
    slurm_lab.run("sbatch", *rush)
    said = finish(driver)
    assert_sound(cluster, reference, once=False)
    assert times_trained(cluster) == 2, said


def submitted(cluster: Lab) -> list[str]:
    """Return the stages of every job that sbatch was handed, each as often as it was."""
    stages = []
    for path in cluster.folder.glob("logs/*/submission-*.sh"):
        (tasks,) = re.findall(r"#SBATCH --array=(\S+)", path.read_text())
        jobs = (cluster.store().get_json(f"submissions/{path.parent.name}.json") or {})["jobs"]
        stages += [stage["key"] for task in expand(tasks) for stage in jobs[task]["stages"]]
    return stages


UNSOUND = {
    "all": {
        "sbatch": ["silent", "lost"],
        "squeue": ["ok", "nothing", "garbage", "words", "ok", "heading"],
        "sacct": ["words", "nothing"],
    },
    "squeue": {"squeue": ["ok", *["nothing", "garbage", "heading"] * 4]},
    "sacct": {"sacct": ["words", "nothing", "garbage"] * 4},
}


@pytest.mark.parametrize(
    "case", ["all", *(pytest.param(case, marks=pytest.mark.faults) for case in ("squeue", "sacct"))]
)
def test_commands_that_answer_nonsense_lose_nothing_and_submit_nothing_twice(
    slurm_lab: SlurmLab, cluster: Lab, reference: dict[str, Any], case: str
) -> None:
    folder = unsound(cluster.folder / "bin", UNSOUND[case])
    code, said = cluster.drive(PATH=f"{folder}{os.pathsep}{os.environ['PATH']}", **OUTER)
    assert code == 0, said
    assert_sound(cluster, reference)
    stages = submitted(cluster)
    assert len(stages) == len(set(stages)), said
    for name in UNSOUND[case]:
        assert any(not call.startswith("ok") for call in calls(folder, name)), name


@pytest.mark.faults
@pytest.mark.parametrize("fault", ["scancel", "requeue", "drain"])
def test_what_an_administrator_does_to_a_job_loses_nothing(
    slurm_lab: SlurmLab, cluster: Lab, reference: dict[str, Any], fault: str
) -> None:
    driver = cluster.start(FAKE_STEP_SECONDS="0.02")
    job = training(cluster)
    node = slurm_lab.run("squeue", "--noheader", "--format=%N", f"--jobs={job}")
    if fault == "scancel":
        slurm_lab.run("scancel", job)
    elif fault == "requeue":
        slurm_lab.run("scontrol", "requeue", job)
    else:
        slurm_lab.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", "Reason=test")
    try:
        said = finish(driver)
    finally:
        if fault == "drain":
            slurm_lab.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    assert_sound(cluster, reference, once=fault == "drain")
    assert times_trained(cluster) == (1 if fault == "drain" else 2), said


@pytest.mark.faults
def test_a_controller_that_is_down_for_a_minute_stops_nothing(
    slurm_lab: SlurmLab, cluster: Lab, reference: dict[str, Any]
) -> None:
    driver = cluster.start(FAKE_STEP_SECONDS="0.05")
    training(cluster)
    slurm_lab.kill("slurmctld", signal.SIGKILL)
    time.sleep(60)
    slurm_lab.start("slurmctld", "-f", slurm_lab.environment["SLURM_CONF"])
    said = finish(driver)  # a node tells of a job that ended meanwhile only after a while
    assert "running jobs go on, trying again" in said
    assert_sound(cluster, reference)


@pytest.mark.faults
def test_a_node_whose_daemon_is_killed_under_a_running_stage(
    slurm_lab: SlurmLab, cluster: Lab, reference: dict[str, Any]
) -> None:
    """The stage's process lives on without its daemon, as on a node that lost its network: its lease is taken."""
    driver = cluster.start(FAKE_STEP_SECONDS="0.4")
    job = training(cluster)
    node = slurm_lab.run("squeue", "--noheader", "--format=%N", f"--jobs={job}")
    slurm_lab.kill(f"slurmd.{node}", signal.SIGKILL)
    try:
        cluster.wait_for(lambda: times_trained(cluster) == 2, "the training to begin again", 180)
        finish(driver)
    finally:
        slurm_lab.start("slurmd", "-f", slurm_lab.environment["SLURM_CONF"], "-N", node)
    assert_sound(cluster, reference, once=False)
    eventually(lambda: slurm_lab.run("sinfo", "-h", "-n", node, "-o", "%T").startswith("idle"))


@pytest.mark.faults
def test_a_kill_for_memory_is_tried_again_with_more(
    slurm_lab: SlurmLab, cluster: Lab, reference: dict[str, Any]
) -> None:
    cluster.order({"label": "pretrain", "do": "hoard", "times": 1})
    code, said = cluster.drive()
    assert code == 0, said
    assert "OUT_OF_MEMORY" in said
    assert_sound(cluster, reference, once=False)
    assert times_trained(cluster) == 2


def test_a_grid_begun_here_ends_on_the_cluster_after_its_driver_died(
    slurm_lab: SlurmLab, cluster: Lab, reference: dict[str, Any]
) -> None:
    cluster.site = SITE
    driver = cluster.start(FAKE_STEP_SECONDS="0.02")
    cluster.wait_for(lambda: times_trained(cluster), "training", 180)
    time.sleep(0.7)
    driver.kill()
    for pid in cluster.job_pids():
        os.kill(pid, signal.SIGKILL)
    cluster.site = HERE / "slurm.yaml"
    driver = cluster.start("resume", FAKE_STEP_SECONDS="0.02")
    training(cluster)
    driver.kill()  # the job goes on, and the next driver finds it
    code, said = cluster.drive("resume")
    assert code == 0, said
    assert_sound(cluster, reference, once=False)
    assert times_trained(cluster) == 2
