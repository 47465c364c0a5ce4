#!/usr/bin/env bash
# A private MLflow server on this machine: infra/mlflow/lab.sh up | down [--wipe] | status
#
# One web worker on loopback, sqlite and artifacts in $MOEGRID_LAB/mlflow. Point a shell at it with: . $MOEGRID_LAB/mlflow/env
set -euo pipefail
root=$(dirname "$(readlink -f "$0")")/../..
MOEGRID_LAB=${MOEGRID_LAB:-${TMPDIR:-/tmp}/moegrid-lab-$(id -u)}
LAB=$MOEGRID_LAB/mlflow
MLFLOW=${MLFLOW:-$root/.venv/bin/mlflow}

fail() { echo "error: $1" >&2; [ -z "${2:-}" ] || echo "hint: $2" >&2; exit 3; }

started() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" {print $20}'; }

alive() {  # what ended before its start was noted has none, then and now
    local since; [ -s "$LAB/pid" ] && since=$(started "$(cut -d' ' -f1 "$LAB/pid")") && [ -n "$since" ] && [ "$since" = "$(cut -d' ' -f2 "$LAB/pid")" ]
}

answers() { python3 -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/health", timeout=2)' "$1" 2>/dev/null; }

up() {
    command -v "$MLFLOW" >/dev/null || fail "mlflow is not installed" "make setup"
    if alive; then echo "the MLflow lab is up already" >&2; return; fi
    mkdir -p "$LAB/artifacts"
    local port url i
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    url=http://127.0.0.1:$port
    setsid "$MLFLOW" server --host 127.0.0.1 --port "$port" --workers 1 --backend-store-uri "sqlite:///$LAB/mlflow.db" \
        --artifacts-destination "$LAB/artifacts" </dev/null >"$LAB/log" 2>&1 &
    echo "$! $(started $!)" >"$LAB/pid"
    for i in $(seq 300); do answers "$url" && break; alive || break; sleep 0.2; done
    answers "$url" || fail "the MLflow server did not come up" "see $LAB/log"
    echo "export MLFLOW_TRACKING_URI=$url" >"$LAB/env"
    echo "MLflow lab: $url; point a shell at it with: . $LAB/env" >&2
}

down() {
    if alive; then
        local pid i; pid=$(cut -d' ' -f1 "$LAB/pid")
        kill -- "-$pid"  # the server's own session: its workers too
        for i in $(seq 100); do alive || break; sleep 0.1; done
        rm -f "$LAB/pid"
    fi
    [ "${1:-}" != --wipe ] || rm -rf "$LAB"
}

case ${1:-} in
    up) up ;;
    down) down "${2:-}" ;;
    status) alive && cat "$LAB/env" || fail "the MLflow lab is down" "$0 up" ;;
    *) echo "usage: $0 up | down [--wipe] | status" >&2; exit 2 ;;
esac
