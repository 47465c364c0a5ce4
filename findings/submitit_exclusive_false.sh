#!/usr/bin/env bash
# Library: submitit==1.5.4
# Version 1.5.4
# Guess: `slurm_exclusive=False` (its type is bool or text) asks for a node that may be shared, so the file has no --exclusive.
# Seen: values are written by str() except True and None, so the submission file says `#SBATCH --exclusive=False`, which
#   sbatch refuses ("Invalid --exclusive specification"). Entries of `slurm_additional_parameters` are written so too, None
#   included: `--reservation=None`. A caller must leave out what is false or empty, and join lists, itself.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q submitit==1.5.4
mkdir "$folder/bin"
# submitit wants srun to be there, and hands its file to sbatch: this one shows it.
printf '#!/bin/sh\nexit 0\n' >"$folder/bin/srun"
printf '#!/bin/sh\ncat "$1" >"%s/submitted"\necho "Submitted batch job 1"\n' "$folder" >"$folder/bin/sbatch"
chmod +x "$folder/bin/srun" "$folder/bin/sbatch"
cd "$folder"
PATH="$folder/bin:$PATH" "$folder/venv/bin/python" - <<'P'
import submitit

executor = submitit.AutoExecutor(folder="logs", cluster="slurm")
executor.update_parameters(slurm_exclusive=False, slurm_additional_parameters={"reservation": None})
executor.submit(print, "hello")
P
grep -E -- '--(exclusive|reservation)' submitted
grep -qxF -- '#SBATCH --exclusive=False' submitted
grep -qxF -- '#SBATCH --reservation=None' submitted
echo "as seen: False and None are written out"
