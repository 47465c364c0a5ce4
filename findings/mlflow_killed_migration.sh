#!/usr/bin/env bash
# Library: mlflow==3.17.2
# Version of what it stands on: sqlalchemy==2.0.51, alembic==1.18.5 (SQLite of Python's own).
# Guess: MLflow makes a new SQLite database in one transaction, or goes on with its migrations at the next start: a
#   process that is killed in the middle costs nothing.
# Seen: each migration commits by itself, and on SQLite a table is changed by way of a table `_alembic_tmp_*`. After a
#   SIGKILL that table stays, and every later start ends with "table _alembic_tmp_... already exists", for ever.
# Exits 0 while this is so, 1 when a later start works again.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q mlflow-skinny==3.17.2 sqlalchemy==2.0.51 alembic==1.18.5
cat > "$work/killed.py" <<'PY'
import os, signal, sys
from alembic.runtime.migration import HeadMaintainer
real, left = HeadMaintainer.update_to_step, [5]
def update(self, step):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)  # a moment like any other between two of its commits
    return real(self, step)
HeadMaintainer.update_to_step = update
from mlflow.tracking import MlflowClient
MlflowClient(sys.argv[1]).search_experiments()
PY
export MLFLOW_DISABLE_TELEMETRY=true
uri="sqlite:///$work/mlflow.db"
"$work/venv/bin/python" "$work/killed.py" "$uri" > "$work/first.txt" 2>&1 || echo "first start: killed, $(stat -c %s "$work/mlflow.db") bytes left"
for try in 1 2; do
    if "$work/venv/bin/python" -c "import sys; from mlflow.tracking import MlflowClient; MlflowClient(sys.argv[1]).search_experiments()" "$uri" > "$work/later.txt" 2>&1; then
        echo "later start $try: works"
        exit 1
    fi
    echo "later start $try: $(grep -o 'table _alembic_tmp[a-z_]* already exists' "$work/later.txt" | head -n 1)"
done
grep -q 'table _alembic_tmp[a-z_]* already exists' "$work/later.txt"
