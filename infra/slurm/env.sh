# Source this to point sbatch, squeue and moegrid at the lab: . infra/slurm/env.sh
export MOEGRID_LAB=${MOEGRID_LAB:-${TMPDIR:-/tmp}/moegrid-lab-$(id -u)}
export SLURM_LAB=$MOEGRID_LAB/slurm
export SLURM_CONF=$SLURM_LAB/slurm.conf
