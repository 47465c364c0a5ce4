"""A grid whose driver was started inside another job, by torchrun or on an allocation, runs as anywhere else."""

from __future__ import annotations

from typing import Any

from tests.faults.harness import Lab, assert_sound

OUTER = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SBATCH_PARTITION": "nowhere",
    "SQUEUE_USERS": "nobody",
}


def test_one_process_waits_for_no_ranks_of_an_outer_job(lab: Lab, reference: dict[str, Any]) -> None:
    code, said = lab.drive(**OUTER)
    assert code == 0, said
    assert_sound(lab, reference)
