# Source this to point moegrid at the lab's bucket: . infra/s3/env.sh; make grid GRID=quickstart STORE=s3://moegrid/runs
export MOEGRID_LAB=${MOEGRID_LAB:-${TMPDIR:-/tmp}/moegrid-lab-$(id -u)}
export S3_LAB=$MOEGRID_LAB/s3
[ ! -s "$S3_LAB/client.env" ] || { set -a; . "$S3_LAB/client.env"; set +a; }
