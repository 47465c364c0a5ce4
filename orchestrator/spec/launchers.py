"""Variables by which launchers and schedulers tell a process its place.

Those of an outer job (`torchrun`, `mpirun`, `sbatch`, `salloc`) must not reach a job of ours: it would wait for ranks
that do not exist, or ask SLURM for another job's resources.
"""

from __future__ import annotations

from collections.abc import Mapping

# What torch.distributed, DeepSpeed and Accelerate read.
_PLACE = frozenset(
    (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "LOCAL_SIZE",
        "NODE_RANK",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_NAME",
        "ROLE_WORLD_SIZE",
        "CROSS_RANK",
        "CROSS_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
)
_LAUNCHERS = (
    "TORCHELASTIC_",
    "PET_",  # torchrun's options
    "ACCELERATE_",
    "HOROVOD_",
    "OMPI_COMM_WORLD_",
    "OMPI_UNIVERSE_SIZE",
    "OMPI_APP_CTX",
    "OMPI_MCA_orte_",
    "OMPI_MCA_ess",
    "MPI_LOCAL",
    "MV2_COMM_WORLD_",
    "PMI_",
    "PMIX_",
    "PALS_",
    "HYDRA_",
    "HYDI_",
    "FLUX_TASK_",
    "FLUX_JOB_",
    "JSM_",
)
_SLURM = (
    "SLURM_",
    "SLURMD_",
    "SBATCH_",
    "SALLOC_",
    "SRUN_",
    "SQUEUE_",
    "SACCT_",
    "SINFO_",
    "SCONTROL_",
    "SCANCEL_",
)
# Which cluster SLURM's commands talk to, and as whom.
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_SACK")


def is_place(name: str) -> bool:
    """Does this variable tell a process its place among ranks?"""
    return name in _PLACE or name.startswith(_LAUNCHERS)


def outside(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment as it would be outside every launcher and scheduler."""
    return {
        name: value
        for name, value in environment.items()
        if not is_place(name) and (name.startswith(_KEPT) or not name.startswith(_SLURM))
    }
