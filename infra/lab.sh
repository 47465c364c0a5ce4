#!/usr/bin/env bash
# All labs of this machine at once (SLURM, Ray, S3, MLflow): infra/lab.sh up | down [--wipe] | env
#
# LABS names those that are wanted. State in $MOEGRID_LAB, own processes only, nothing that listens to other machines
# without a token. Point a shell at all of them with: eval "$(infra/lab.sh env)"
set -euo pipefail
here=$(dirname "$(readlink -f "$0")")
LABS=${LABS:-slurm ray s3 mlflow}
export MOEGRID_LAB=${MOEGRID_LAB:-${TMPDIR:-/tmp}/moegrid-lab-$(id -u)}

case ${1:-} in
    up)
        for lab in $LABS; do "$here/$lab/lab.sh" up; done
        echo "point a shell at the labs with: eval \"\$($here/lab.sh env)\"" >&2
        ;;
    down) for lab in $LABS; do "$here/$lab/lab.sh" down "${2:-}"; done ;;
    env)
        echo "export MOEGRID_LAB=$MOEGRID_LAB"
        for lab in slurm s3; do [ ! -d "$MOEGRID_LAB/$lab" ] || echo ". $here/$lab/env.sh"; done
        for lab in ray mlflow; do [ ! -f "$MOEGRID_LAB/$lab/env" ] || echo ". $MOEGRID_LAB/$lab/env"; done
        ;;
    *) echo "usage: $0 up | down [--wipe] | env" >&2; exit 2 ;;
esac
