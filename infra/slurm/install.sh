#!/usr/bin/env bash
# Install what the SLURM lab needs from Debian or Ubuntu packages (root). Starts nothing.
set -euo pipefail
if command -v slurmctld slurmd slurmdbd sbatch munged mariadbd >/dev/null; then exit 0; fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client slurmdbd munge mariadb-server
