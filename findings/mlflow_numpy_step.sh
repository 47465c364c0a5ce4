#!/usr/bin/env bash
# Library: mlflow==3.17.2
# Version: as released, sqlite store
# Guess: a step that is a numpy integer is stored as that number, or refused
# Seen: it is accepted and stored as a blob of eight bytes; every later point of the metric then raises
#   "'>' not supported between instances of 'int' and 'bytes'", and the history holds a step of type bytes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
${PYTHON:-python3} -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check mlflow-skinny==3.17.2 sqlalchemy==2.0.51 alembic==1.18.5 numpy==2.4.6
cd "$folder"
MLFLOW_DISABLE_TELEMETRY=true "$folder/venv/bin/python" - <<'E'
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

client = MlflowClient("sqlite:///mlflow.db")
run = client.create_run(client.create_experiment("e")).info.run_id
client.log_metric(run, "loss", 1.0, step=0)
client.log_metric(run, "loss", 2.0, step=np.int64(1))
try:
    client.log_metric(run, "loss", 3.0, step=2)
    raise SystemExit("a later point was taken")
except MlflowException as error:
    print(error)
    assert "'int' and 'bytes'" in str(error)
steps = [point.step for point in client.get_metric_history(run, "loss")]
print(steps)
assert any(isinstance(step, bytes) for step in steps)
E
